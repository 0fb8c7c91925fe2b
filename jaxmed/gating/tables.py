"""What a study of a gate found: gate.csv, one row per kind of group and its size, and verdicts.csv, one row per claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.files import read_csv, write_csv
from jaxmed.gating.cases import Case
from jaxmed.gating.job import GateJob
from jaxmed.gating.rankings import RANKINGS
from jaxmed.gating.verdicts import ABSENT, DESCRIBED, Curve, Verdict, adjacency, gating, sparsity, sufficiency, whole_layer
from jaxmed.statistics import group_means, mean_interval, ratio_interval

VERDICTS = "verdicts.csv"
COLUMNS = ["role", "by", "k", "draw", "pairs", "mean", "ci_low", "ci_high", "share", "share_low", "share_high"]


@dataclass(frozen=True)
class Measured:
    """Effects of all cases on held-out pairs.

    Attributes:
        effects: case -> float [P].
        total, whole: float [P], y(source) - y(base), and the effect of the layer's MLP.
        singles: float [2, P, F], effects of single neurons of the layer and of the control layer.
        groups: str [P].
        counted: bool [P], whether a pair is no control.
    """

    effects: dict[Case, np.ndarray]
    total: np.ndarray
    whole: np.ndarray
    singles: np.ndarray
    groups: np.ndarray
    counted: np.ndarray

    def by_group(self, values: np.ndarray, counted: bool = True) -> np.ndarray:
        """Means over groups of values [P]; `counted`: those of pairs that are no controls, else of controls."""
        kept = self.counted == counted
        return group_means(np.asarray(values, np.float64)[kept, None], self.groups[kept])[0][:, 0]

    def of(self, role: str, by: str, k: int) -> np.ndarray:
        """The effects of a case, averaged over its draws: [P]."""
        return np.mean([values for case, values in self.effects.items() if (case.role, case.by, case.k) == (role, by, k)], axis=0)

    def curve(self, role: str, by: str = "effect") -> Curve:
        """The effects of groups of rising size, by group of pairs."""
        ks = sorted({case.k for case in self.effects if (case.role, case.by) == (role, by)})
        return {k: self.by_group(self.of(role, by, k)) for k in ks}


def row(role: str, by: str, k: Any, values: np.ndarray, of: np.ndarray | None, pairs: str = "held out", draw: Any = "") -> dict[str, Any]:
    """A row of gate.csv: mean of values [groups], and their share of another effect, with intervals."""
    low, high = mean_interval(values)
    found: dict[str, Any] = {"role": role, "by": by, "k": k, "draw": draw, "pairs": pairs}
    found |= {"mean": float(values.mean()), "ci_low": float(low), "ci_high": float(high)}
    if of is not None:
        found |= dict(zip(("share", "share_low", "share_high"), ratio_interval(values, of), strict=True))
    return found


def gate_rows(job: GateJob, found: Measured) -> list[dict[str, Any]]:
    """All rows of gate.csv. Shares are of the layer's MLP, but for those of the total (total, whole MLP, upstream), and for
    `held`, where they are what is left of the upstream effect."""
    total, whole = found.by_group(found.total), found.by_group(found.whole)
    rows = [row("total", "", "", total, None), row("whole MLP", f"layer {job.layout.layer}", "", whole, total)]
    for role in ("top", "rest", "matched", "other layer"):
        for by in RANKINGS:
            rows += [row(role, by, k, values, whole) for k, values in found.curve(role, by).items()]
    for module in job.layout.upstream:
        upstream = found.by_group(found.effects[Case("upstream", module)])
        rows.append(row("upstream", module, "", upstream, total))
        for role in ("held", "held matched"):
            rows += [row(role, module, k, values, upstream) for k, values in found.curve(role, module).items()]
    if not found.counted.all():
        rows.append(row("whole MLP", f"layer {job.layout.layer}", "", found.by_group(found.whole, False), None, "controls"))
        for k in job.layout.ladder:
            rows.append(row("top", "effect", k, found.by_group(found.of("top", "effect", k), False), None, "controls"))
    return rows + [line for width in job.layout.windows for line in _window_rows(found, width)]


def _window_rows(found: Measured, width: int) -> list[dict[str, Any]]:
    spreads, same = window_spreads(found, width), {"by": width, "pairs": "held out"}
    shuffled = [{"role": "shuffled windows", "draw": draw, "mean": one, **same} for draw, one in enumerate(spreads[1:])]
    return [{"role": "windows", "mean": spreads[0], **same}, *shuffled]


def window_spreads(found: Measured, width: int) -> np.ndarray:
    """Root mean square over windows of their mean effects: of adjacent neurons, then of every shuffled order."""
    parts: dict[int, list[float]] = {}
    for case, values in found.effects.items():
        if case.role in ("window", "shuffled") and case.by == str(width):
            parts.setdefault(case.draw + 1 if case.role == "shuffled" else 0, []).append(float(found.by_group(values).mean()))
    return np.asarray([np.sqrt(np.mean(np.square(parts[number]))) for number in sorted(parts)])


def enough(job: GateJob, found: Measured) -> tuple[Verdict, int | None]:
    """Whether a small group suffices, and its size; see `sufficiency`."""
    whole, part = found.by_group(found.whole), job.request.spec.sufficient
    return sufficiency(found.curve("top"), found.curve("matched"), whole, job.layout.neurons, part)


def make_verdicts(job: GateJob, found: Measured) -> list[Verdict]:
    """The claims, one by one."""
    total, whole = found.by_group(found.total), found.by_group(found.whole)
    verdicts = [whole_layer(job.layout.layer, whole, total)]
    small, k = enough(job, found)
    verdicts.append(small)
    for module in job.layout.upstream:
        upstream = found.by_group(found.effects[Case("upstream", module)])
        verdicts.append(gating(module, k, upstream, found.curve("held", module), found.curve("held matched", module), total))
    singles = [group_means(effects[found.counted], found.groups[found.counted])[0].mean(axis=0) for effects in found.singles]
    verdicts.append(sparsity(*singles))
    verdicts += [adjacency(width, window_spreads(found, width)) for width in job.layout.windows]
    if verdicts[0].verdict == ABSENT:  # what there is of effects is of something else
        verdicts = [one if one.verdict == DESCRIBED else replace(one, verdict=ABSENT, why=verdicts[0].why) for one in verdicts]
    return verdicts


def write_tables(job: GateJob, found: Measured, out: Path, more: Sequence[Verdict] = ()) -> None:
    """Writes gate.csv and verdicts.csv, with further verdicts at its end."""
    rows: list[Mapping[str, Any]] = list(gate_rows(job, found))
    write_csv(out / "gate.csv", rows, COLUMNS)
    write_csv(out / VERDICTS, [asdict(one) for one in (*make_verdicts(job, found), *more)])


def read_verdicts(out: Path) -> list[Verdict]:
    """The verdicts of a study's folder."""
    return [Verdict(**row) for row in read_csv(out / VERDICTS, ("claim", "verdict", "unit", "why"))]
