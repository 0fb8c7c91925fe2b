"""The claims of causal mediation analysis of harmful generation, each answered from the tables of a study."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from jaxmed.gating.job import GateJob
from jaxmed.gating.tables import VERDICTS, read_verdicts
from jaxmed.gating.verdicts import ABSENT, DESCRIBED, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Verdict, is_seen
from jaxmed.results import open_results
from jaxmed.statistics import FEWEST_FOR_INTERVAL, group_means, mean_interval, ratio_interval

SHARE = "share of the total"


def make_claims(gate: GateJob, out: Path) -> list[Verdict]:
    """All claims of a study's folder, those of the gate and of the bridge at the end."""
    reading, writing = (_by_group(open_results(out / name)) for name in ("reading", "writing"))
    total = writing["total"]
    claims = [
        _difference("late layers carry it", writing, "late", "early"),
        _difference("MLPs of late layers carry more of it than attention there", writing, "late mlp_out", "late attention_out"),
        _two_stages(reading, writing),
    ]
    if (out / "control").is_dir():
        claims.append(_of_the_behaviour(total, _by_group(open_results(out / "control"), controls=True)["total"]))
    if is_seen(total, total) is False:
        why = "base and source do not differ on this outcome: the interval of the total holds zero"
        claims = [Verdict(one.claim, ABSENT, one.unit, why) for one in claims]
    parts = [out / name for name in ("gate", "bridge") if (out / name / VERDICTS).is_file()]
    return [*_profiles(reading, writing), *claims, *(verdict for part in parts for verdict in read_verdicts(part))]


def _by_group(table: xr.Dataset, controls: bool = False) -> dict[str, np.ndarray]:
    """Means over groups: the total [groups], every joint set [groups], and modules [groups, layers].

    Args:
        controls: whether pairs that are marked as controls count; else they are left out.
    """
    table = table.load()
    kept = np.ones(table.sizes["pair"], bool) if controls else table.control.values == ""
    groups = table.group.values[kept]
    found = {"total": table.source_outcome.values - table.base_outcome.values}
    found |= {str(name): table.joint.sel(set=name).values for name in table.set.values}
    found |= {name: table[name].transpose("pair", "layer").values for name in ("attention_out", "mlp_out", "both_out")}
    means = {name: group_means(values[kept].reshape(len(groups), -1), groups)[0] for name, values in found.items()}
    return {name: values[:, 0] if found[name].ndim == 1 else values for name, values in means.items()}


def _answer(low: float, high: float) -> str:
    return UNDECIDED if math.isnan(low) else SUPPORTED if low > 0 else NOT_SUPPORTED if high < 0 else UNDECIDED


def _share(of: dict[str, np.ndarray], name: str) -> float:
    return float(of[name].mean() / of["total"].mean()) if of["total"].mean() else math.nan


def _difference(claim: str, of: dict[str, np.ndarray], more: str, less: str) -> Verdict:
    """Whether one joint patch does more toward the source's outcome than another, group by group."""
    make = partial(Verdict, claim, unit=f"{SHARE}, {more} minus {less}")
    estimate, low, high = ratio_interval(of[more] - of[less], of["total"]) if of["total"].mean() else (math.nan,) * 3
    why = f"patched together, {more} has {_share(of, more):.0%} of the total and {less} {_share(of, less):.0%}"
    if math.isnan(low):
        why += f"; {len(of['total'])} groups give no interval (at least {FEWEST_FOR_INTERVAL})"
    return make(_answer(low, high), why=why, estimate=estimate, low=low, high=high)


def _two_stages(reading: dict[str, np.ndarray], writing: dict[str, np.ndarray]) -> Verdict:
    """Whether the request is read in early layers at one place and the answer is written in late ones at another."""
    early = _difference("", reading, "early", "late")
    late = _difference("", writing, "late", "early")
    answers = {early.verdict, late.verdict}
    verdict = SUPPORTED if answers == {SUPPORTED} else NOT_SUPPORTED if NOT_SUPPORTED in answers else UNDECIDED
    why = f"where it is read: {early.why}; where it is written: {late.why}"
    return Verdict("early layers read, late layers write", verdict, early.unit, why, early.estimate, early.low, early.high)


def _of_the_behaviour(total: np.ndarray, control: np.ndarray) -> Verdict:
    """Whether the total is one of the behaviour, and not of any change of words."""
    (low, high), (least, most) = mean_interval(total), mean_interval(control)
    largest, smallest = float(np.abs([least, most]).max()), float(np.abs([low, high]).min()) if low * high > 0 else 0.0
    answer = UNDECIDED if math.isnan(low) or math.isnan(least) else SUPPORTED if smallest > largest else UNDECIDED
    if answer == UNDECIDED and not math.isnan(least) and abs(control.mean()) >= abs(total.mean()):
        answer = NOT_SUPPORTED
    why = f"control pairs have a mean total of {control.mean():+.3f} ({least:+.3f} to {most:+.3f})"
    claim = "the total is of the behaviour, not of any change of words"
    return Verdict(claim, answer, "total", why, float(total.mean()), float(low), float(high))


def _profiles(reading: dict[str, np.ndarray], writing: dict[str, np.ndarray]) -> list[Verdict]:
    """Centres of mass of what the layers add, as descriptions."""
    found = []
    for place, of in (("read", reading), ("written", writing)):
        mean = np.abs(of["both_out"].mean(axis=0))
        centre = float(np.arange(len(mean)) @ mean / mean.sum()) if mean.sum() else math.nan
        why = f"mean absolute effect of what each layer adds; layers 0 to {len(mean) - 1}, the middle is {(len(mean) - 1) / 2:.1f}"
        found.append(Verdict(f"centre of mass of the layers where it is {place}", DESCRIBED, "layer", why, centre))
    return found
