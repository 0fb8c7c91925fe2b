"""Where a behaviour is mediated in every model of a study of emergent misalignment, as the study of mediation sees it: effects of attention
and MLP outputs, layer by layer, where the request is read and where the answer is written."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxmed.effects.job import Job, make_job
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.request import Request
from jaxmed.effects.sweep import run_sweep
from jaxmed.errors import UserError
from jaxmed.files import Row
from jaxmed.gating.verdicts import DESCRIBED, Verdict
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.results import open_results
from jaxmed.runs.watch import Watch, silent
from jaxmed.statistics import group_means, mean_interval

UNITS = ("attention_out", "mlp_out")
WRITTEN = "written"
PLACES = {"read": "user_last", WRITTEN: "last"}
"""Where the request is read and where the answer is written -> position of a sweep."""
TOTAL = "total"


def profile_jobs(model: Model, pairs: Sequence[PromptPair], form: str, outcome: OutcomeName = "log-odds") -> dict[str, Job]:
    """Place -> its sweep; none without pairs.

    Raises:
        UserError: pairs or a form that a sweep refuses.
    """
    request = Request(outcomes=(outcome,), units=UNITS, form=form)
    try:
        return {name: make_job(model, pairs, replace(request, position=at)) for name, at in PLACES.items()} if pairs else {}
    except UserError as error:
        fix = "Give other --profiled pairs, another --profile-outcome, or --profiled '' for no profiles."
        raise UserError(f"The mediation profiles cannot be measured. {error}\n{fix}") from None


@dataclass(frozen=True)
class Profile:
    """Effects in one model.

    Attributes:
        effects: (place, unit) -> float64 [groups, layers]; ("written", "total") -> [groups, 1], source's outcome minus base's.
    """

    effects: Mapping[tuple[str, str], np.ndarray]

    def means(self) -> np.ndarray:
        """Mean effects of all layers, units and places, [places * units * layers]."""
        return np.concatenate([values.mean(axis=0) for (_, unit), values in self.effects.items() if unit != TOTAL])


def measure_profile(jobs: Mapping[str, Job], model: Model, report: Watch = silent) -> Profile:
    """The profile of a model; exact effects, which are kept in memory alone."""
    found = {}
    for place, job in jobs.items():
        with tempfile.TemporaryDirectory() as scratch:
            run_sweep(job.with_weights(model), Path(scratch) / "run", watch=report)
            table = open_results(Path(scratch) / "run").load()
        groups = table.group.values
        values = {unit: table[unit].transpose("pair", "layer").values for unit in UNITS}
        if place == WRITTEN:  # the other place has the same
            values[TOTAL] = (table.source_outcome.values - table.base_outcome.values)[:, None]
        found |= {(place, unit): group_means(np.asarray(of, np.float64), groups)[0] for unit, of in values.items()}
    return Profile(found)


def profile_rows(own: Profile, original: Profile) -> list[Row]:
    """A row per place, unit and layer: the effect with its interval over groups, and its change from the original, pair by pair."""
    rows = []
    for (place, unit), values in own.effects.items():
        change = values - original.effects[place, unit]
        ends = {"effect": (values, *mean_interval(values)), "change": (change, *mean_interval(change))}
        for layer in range(values.shape[1]):
            row: Row = {"place": place, "unit": unit, "layer": "" if unit == TOTAL else layer}
            for name, (of, low, high) in ends.items():
                row |= {name: float(of[:, layer].mean()), f"{name}_low": float(low[layer]), f"{name}_high": float(high[layer])}
            rows.append(row)
    return rows


def profile_claims(rows: Sequence[Row], original: str) -> list[Verdict]:
    """How like the original's every model's profile is, and what became of the total; described, nothing is decided."""
    names = dict.fromkeys(str(row["model"]) for row in rows)
    return [_likeness(name, original, rows) for name in names if name != original]


def _likeness(name: str, original: str, rows: Sequence[Row]) -> Verdict:
    of = {which: [row for row in rows if row["model"] == which] for which in (name, original)}
    before = _vector([row for row in of[original] if row["seed"] == of[original][0]["seed"]])
    seeds = dict.fromkeys(row["seed"] for row in of[name])
    alike = [_correlation(_vector([row for row in of[name] if row["seed"] == seed]), before) for seed in seeds]
    totals = {which: np.mean([row["effect"] for row in found if row["unit"] == TOTAL]) for which, found in of.items()}
    changes = [float(row["change"]) for row in of[name] if row["unit"] == TOTAL]
    why = (
        f"total effect of the profiled pairs: {original} {totals[original]:+.2f}, {name} {totals[name]:+.2f} (change by seed "
        f"{min(changes):+.2f} to {max(changes):+.2f}); the median layer, weighted by absolute effects at both places, is "
        f"{_median_layer(of[original]):.0f} in {original}, {_median_layer(of[name]):.0f} in {name}"
    )
    claim = f"the mediation profile is kept: {name}"
    unit = f"correlation of effects with those in {original}, range over seeds"
    return Verdict(claim, DESCRIBED, unit, why, float(np.mean(alike)), min(alike), max(alike))


def _vector(rows: Sequence[Row]) -> np.ndarray:
    return np.asarray([row["effect"] for row in rows if row["unit"] != TOTAL], np.float64)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else math.nan


def _median_layer(rows: Sequence[Row]) -> float:
    kept = [row for row in rows if row["unit"] != TOTAL]
    size = np.zeros(1 + max(int(row["layer"]) for row in kept))
    np.add.at(size, [int(row["layer"]) for row in kept], [abs(float(row["effect"])) for row in kept])
    return float(np.searchsorted(np.cumsum(size), size.sum() / 2)) if size.sum() else math.nan
