"""Experiments over masks: a behaviour against the share of pruned weights, and the transfer of masks between behaviours."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.models.load import Model
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.matrices import weights_by_name
from jaxmed.pruning.measure import Tests, compare, measure, measure_mask
from jaxmed.pruning.rule import SCORES, Rule
from jaxmed.pruning.scores import Scores
from jaxmed.pruning.selection import needs_weights, random_like, select

CURVE, TRANSFER = "curve.csv", "transfer.csv"
SAME_COUNTS = "random"
"""The baseline that draws as many weights of every matrix as the first rule chose."""


def curve_masks(
    scores: Scores, rule: Rule, qs: Sequence[float], against: Sequence[str], seeds: int, weights: Any
) -> Iterator[tuple[Any, Mask]]:
    """((rule's score, q, seed), mask) for every q: of the rule, and of every other in `against` at the same q and p."""
    for q in qs:
        first = select(scores, replace(rule, q=q), weights)
        yield (rule.score, q, 0), first
        for score in against:
            for seed in range(seeds) if score == SAME_COUNTS else (0,):
                other = random_like(first, seed) if score == SAME_COUNTS else select(scores, replace(rule, q=q, score=score), weights)
                yield (score, q, seed), other


def run_curve(
    model: Model,
    scores: Scores,
    tests: Tests,
    rule: Rule,
    qs: Sequence[float],
    against: Sequence[str] = (SAME_COUNTS,),
    seeds: int = 1,
    done: Sequence[Mapping[str, Any]] = (),
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row per mask: `rule`, `q`, `seed`, and what `measure_mask` gives; the first row is the model as it is.

    Args:
        against: other scores by which as many weights are chosen.
        seeds: draws of the random baseline.
        done: rows of an earlier run, which are not measured again.
        report: called with every new row.

    Raises:
        UserError: values out of range; scores of other weights than the model's.
    """
    for score in against:
        if score not in SCORES:
            raise UserError(f"There is no rule {score!r} to compare with. Legal: {', '.join(SCORES)}.")
    if scores.weights != model.weights_hash:
        raise UserError(f"The scores are of other weights ({scores.model!r}) than {model.name!r} has. Score this model first.")
    for q in qs:
        replace(rule, q=q).check()
    rules = [replace(rule, q=qs[0], score=score) for score in (rule.score, *against)]
    weights = weights_by_name(model) if any(needs_weights(one) for one in rules) else None
    found = [dict(row) for row in done]
    known = {(row["rule"], float(row["q"]), int(row["seed"])) for row in found}
    before = measure(model, tests)
    if ("none", 0.0, 0) not in known:
        row = {"rule": "none", "q": 0.0, "seed": 0, **compare(empty_mask(scores), before, before)}
        found.append(row)
        report(row)
    for key, mask in curve_masks(scores, rule, qs, against, seeds, weights):
        if key in known:
            continue
        row = {**dict(zip(("rule", "q", "seed"), key, strict=True)), **measure_mask(model, mask, tests, before)}
        found.append(row)
        report(row)
    return found


def empty_mask(scores: Scores) -> Mask:
    """The mask of no weights."""
    return Mask({name: np.zeros(0, np.int64) for name in scores.shapes}, scores.shapes, scores.model, scores.weights)


def run_transfer(
    model: Model,
    masks: Mapping[str, Mask],
    tests: Tests,
    seeds: int = 1,
    done: Sequence[Mapping[str, Any]] = (),
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row per mask and test set: prune by the one, test on the other; random masks of the same counts beside each."""
    found = [dict(row) for row in done]
    known = {(row["mask"], int(row["seed"])) for row in found}
    before = measure(model, tests)
    for name, mask in masks.items():
        trials = [(name, 0, mask), *((f"random like {name}", seed, random_like(mask, seed)) for seed in range(seeds))]
        for label, seed, one in trials:
            if (label, seed) not in known:
                row = {"mask": label, "seed": seed, **measure_mask(model, one, tests, before)}
                found.append(row)
                report(row)
    return found


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file that `write_rows` wrote; numbers as numbers."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(handle)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same columns as CSV, whole or not at all."""
    partial = file.with_name(file.name + ".tmp")
    with partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(file)
