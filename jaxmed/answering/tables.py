"""What sets of units do to answers: paired changes of scores, over groups of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from jaxmed import statistics
from jaxmed.answering.job import AnswersJob
from jaxmed.gating.verdicts import ABSENT, LEVEL, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Verdict

EFFECTS = "effects.csv"
COLUMNS = ("set", "prompts", "pair", "sample", "score", "answer")
UNIT = "change of the mean score"
TOTAL, FLAT, FEW = "source prompts, nothing patched", "no answer changed", "too few groups for an interval"


def scores_of(job: AnswersJob, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """float64 [condition, pair, sample]; NaN where the judge could not tell."""
    place = {(one.name, one.prompts): at for at, one in enumerate(job.conditions)}
    pairs = {pair.id: at for at, pair in enumerate(job.pairs)}
    scores = np.full((len(place), len(pairs), job.spec.samples), np.nan)
    for row in rows:
        if row["score"] != "":
            scores[place[row["set"], row["prompts"]], pairs[row["pair"]], int(row["sample"]) - 1] = float(row["score"])
    return scores


def effect_rows(job: AnswersJob, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per set, the total first: the mean score, its paired change, interval, p, share of the total, and how far beyond random sets.

    A pair's score is the mean over its samples; pairs with an answer that was not judged are left out of all rows.
    """
    scores = scores_of(job, rows).mean(axis=2)
    whole = np.flatnonzero(np.isfinite(scores).all(axis=0))
    base, changes = scores[0, whole], (scores[1:, whole] - scores[0, whole]).T  # [pairs, 1 + sets]
    groups = np.asarray([job.pairs[at].group for at in whole])
    if not len(whole):
        return [_row(name, np.nan, {}, "no pair has an answer that was judged everywhere") for name in (TOTAL, *_names(job))]
    found = statistics.summarise(changes, groups, seed=job.spec.seed)
    shares = statistics.share(changes, changes[:, 0], groups)
    more = _beyond_random(job, changes, groups)
    made = []
    for at, name in enumerate((TOTAL, *_names(job))):
        numbers = {key: getattr(found, key)[at] for key in ("mean", "low", "high", "p", "p_adjusted")}
        numbers |= {"share": shares[at] if at else np.nan, **more.get(name, {})}
        note = FLAT if not changes[:, at].any() else FEW if np.isnan(numbers["low"]) else ""
        made.append(_row(name, scores[at + 1, whole].mean(), numbers, note, base.mean(), len(whole), len(np.unique(groups))))
    return made


def _names(job: AnswersJob) -> list[str]:
    return [one.name for one in job.sets]


def _beyond_random(job: AnswersJob, changes: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, float]]:
    """By set: its change minus the mean change of its random sets, with an interval."""
    found, names = {}, _names(job)
    for name, drawn in job.random.items():
        if drawn:
            apart = changes[:, names.index(name) + 1] - changes[:, [names.index(other) + 1 for other in drawn]].mean(axis=1)
            means, _ = statistics.group_means(apart[:, None], groups)
            low, high = statistics.mean_interval(means[:, 0])
            found[name] = {"more_than_random": means.mean(), "more_low": float(low), "more_high": float(high)}
    return found


def verdicts(job: AnswersJob, rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """A claim per set that was asked for: patching it changes how base prompts are answered, further than random sets do.

    Supported: p adjusted over all sets is 0.05 at most, the interval of the change leaves zero out, and so does that of the change beyond
    random sets, on the same side.
    """
    made = [_sides(rows[0])]
    split = made[0].verdict == SUPPORTED
    for row in (row for row in rows[1:] if row["set"] in job.random):
        answer, reason = _answer(row)
        why = f"mean score {row['unpatched']:.2f} as they are, {row['score']:.2f} patched"
        why = f"{reason}; {why}" if reason else why
        if row["more_low"] != "":
            why += f"; beyond random sets {row['more_than_random']:+.3f} ({row['more_low']:.3f} to {row['more_high']:.3f})"
        if row["share"] != "" and split:
            why += f"; {row['share']:.0%} of the difference between the two sides"
        claim = f"patching {row['set']!r} changes how base prompts are answered"
        made.append(Verdict(claim, answer, UNIT, why, *_numbers(row, "p_adjusted")))
    return made


def _answer(row: dict[str, Any]) -> tuple[str, str]:
    """(verdict, reason) of a set's row."""
    if row["note"] == FLAT:
        return NOT_SUPPORTED, FLAT
    if row["low"] == "":
        return UNDECIDED, row["note"] or FEW
    if not statistics.leaves_out_zero(row["low"], row["high"]) or row["p_adjusted"] > LEVEL:
        return UNDECIDED, "the change may be chance"
    if row["more_low"] == "":
        return UNDECIDED, "no random set to compare with"
    side = math.copysign(1, row["mean"])
    least, most = sorted((side * row["more_low"], side * row["more_high"]))
    if least > 0:
        return SUPPORTED, ""
    return (NOT_SUPPORTED, "random sets do more") if most < 0 else (UNDECIDED, "random sets may do as much")


def _sides(total: dict[str, Any]) -> Verdict:
    """Whether the two sides are answered differently at all."""
    why = f"mean score {total['unpatched']:.2f} on base's side, {total['score']:.2f} on source's"
    answer = SUPPORTED
    if total["note"] == FLAT:
        answer, why = ABSENT, f"both sides are answered alike; {why}"
    elif total["low"] == "":
        answer, why = UNDECIDED, f"{total['note'] or FEW}; {why}"
    elif not statistics.leaves_out_zero(total["low"], total["high"]):
        answer, why = UNDECIDED, f"the interval holds zero; {why}"
    return Verdict("base and source are answered differently", answer, UNIT, why, *_numbers(total, "p"))


def _numbers(row: dict[str, Any], p: str) -> list[float]:
    return [math.nan if row[key] == "" else row[key] for key in ("mean", "low", "high", p)]


def _row(
    name: str, score: float, numbers: dict[str, float], note: str, before: float = np.nan, pairs: int = 0, groups: int = 0
) -> dict[str, Any]:
    keys = ("mean", "low", "high", "p", "p_adjusted", "share", "more_than_random", "more_low", "more_high")
    known = {key: "" if np.isnan(numbers.get(key, np.nan)) else float(numbers[key]) for key in keys}
    return {"set": name, "score": float(score), "unpatched": float(before), "pairs": pairs, "groups": groups, **known, "note": note}


def as_table(job: AnswersJob, rows: Sequence[dict[str, Any]]) -> xr.Dataset:
    """Scores and effects as one table."""
    scores, effects = scores_of(job, rows), effect_rows(job, rows)[1:]
    pair, sample = [one.id for one in job.pairs], np.arange(1, job.spec.samples + 1)
    number = lambda key: ("set", [np.nan if row[key] == "" else row[key] for row in effects])  # noqa: E731
    values = {"score": (("set", "pair", "sample"), scores[2:]), "base": (("pair", "sample"), scores[0])}
    values |= {"source": (("pair", "sample"), scores[1]), "effect": number("mean")}
    values |= {key: number(key) for key in ("low", "high", "p", "p_adjusted", "share", "more_than_random", "more_low", "more_high")}
    return xr.Dataset(values, {"set": _names(job), "pair": pair, "sample": sample, "group": ("pair", [one.group for one in job.pairs])})
