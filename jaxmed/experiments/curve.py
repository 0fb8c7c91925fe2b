"""Experiments over masks: a behaviour against the share of pruned weights, and the transfer of masks between behaviours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.experiments.measure import Measured, Tests, compare, measure
from jaxmed.experiments.table import Examples, Table
from jaxmed.models.model import Model
from jaxmed.models.named_weights import weights_by_name
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.rule import SCORES, Rule
from jaxmed.pruning.scores import Scores, token_digest
from jaxmed.pruning.selection import needs_weights, random_like, select
from jaxmed.tokens import Answered

CURVE, TRANSFER = "curve.csv", "transfer.csv"
CURVE_KEY, TRANSFER_KEY = ("rule", "q", "seed"), ("mask", "seed")
EXAMPLES = "examples.csv"
"""Losses of single examples behind a curve."""
SAME_COUNTS = "random"
"""The baseline that draws as many weights of every matrix as the first rule chose."""


def curve_masks(
    scores: Scores, rule: Rule, qs: Sequence[float], against: Sequence[str], seeds: int, weights: Any, preserve: Scores | None = None
) -> Iterator[tuple[Any, Mask]]:
    """((rule's score, q, seed), mask) for every q: of the rule, and of every other in `against` at the same q and p."""
    for q in qs:
        first = select(scores, replace(rule, q=q), weights, preserve=preserve)
        yield (rule.score, q, 0), first
        for score in against:
            for seed in range(seeds) if score == SAME_COUNTS else (0,):
                if score == SAME_COUNTS:
                    yield (score, q, seed), random_like(first, seed)
                else:
                    yield (score, q, seed), select(scores, replace(rule, q=q, score=score), weights, preserve=preserve)


def run_curve(
    model: Model,
    scores: Scores,
    tests: Tests,
    rule: Rule,
    qs: Sequence[float],
    against: Sequence[str] = (SAME_COUNTS,),
    seeds: int = 1,
    table: Table | None = None,
    examples: Examples | None = None,
    preserve: Scores | None = None,
    before: Callable[[], Measured] | None = None,
) -> Table:
    """A row per mask: `rule`, `q`, `seed`, the rise of the scored examples' loss to first order, and what `compare` gives.

    The first row is the model as it is.

    Args:
        against: other scores by which as many weights are chosen.
        seeds: draws of the random baseline.
        table: keeps the rows; those it holds are not measured again.
        examples: keeps the losses of single examples.
        preserve: scores of a preserve set that was scored apart.
        before: what the model as it is measures on the test sets, and perhaps on more.

    Raises:
        UserError: values out of range; scores of other weights than the model's.
    """
    check_curve(model, scores, rule, qs, against, preserve)
    rules = [replace(rule, q=qs[0], score=score) for score in (rule.score, *against)]
    weights = weights_by_name(model) if any(needs_weights(one) for one in rules) else None
    table, examples = table or Table(CURVE_KEY), examples or Examples(CURVE_KEY)
    first = _first(model, tests, before)
    trials = [(("none", 0.0, 0), empty_mask(scores))]
    for key, mask in chain(trials, curve_masks(scores, rule, qs, against, seeds, weights, preserve)):
        if table.has(*key):
            continue
        after = measure(apply_mask(model, mask), tests) if mask.count else first()
        examples.add(key, after.losses)
        first_order = {"first_order": predicted_rise(scores, mask)} if "behaviour_signed" in scores.kinds else {}
        table.add({**dict(zip(CURVE_KEY, key, strict=True)), **first_order, **compare(mask, first(), after)})
    return table


def check_curve(
    model: Model, scores: Scores, rule: Rule, qs: Sequence[float], against: Sequence[str], preserve: Scores | None = None
) -> None:
    """Raises a UserError for values out of range, and for scores of other weights or without a kind that a rule reads."""
    for score in against:
        if score not in SCORES:
            raise UserError(f"There is no rule {score!r} to compare with. Legal: {', '.join(SCORES)}.")
    if scores.weights != model.identity:
        raise UserError(f"The scores are of other weights ({scores.model!r}) than {model.name!r} has. Score this model first.")
    for q in qs:
        replace(rule, q=q).check()
    for one in (rule.score, *against):
        kinds = needed_kinds(replace(rule, q=qs[0], score=one))
        missing = [kind for kind in kinds if kind not in (preserve or scores if kind.startswith("preserve") else scores).kinds]
        if missing:
            raise UserError(f"The rule {one!r} reads {missing[0]!r}, which was not scored. Score again with --kinds {' '.join(kinds)}.")


def needed_kinds(rule: Rule) -> list[str]:
    """The kinds of scores that a rule reads."""
    of_behaviour = {"signed": "signed", "positive": "signed", "absolute": "absolute", "wanda": "inputs"}.get(rule.score)
    of_preserve = {"absolute": "absolute", "wanda": "inputs"}.get(rule.spare) if rule.p else None
    return [f"{which}_{kind}" for which, kind in (("behaviour", of_behaviour), ("preserve", of_preserve)) if kind]


def check_scored(scores: Scores, examples: Sequence[Answered]) -> None:
    """Raises a UserError where these are not the behaviour examples that were scored, token for token."""
    if scores.tokens.get("behaviour") != token_digest(examples):
        raise UserError("The rows of --scored are not those that were scored (another file, split, limit or form).")


def predicted_rise(scores: Scores, mask: Mask) -> float:
    """Rise of the mean loss of the scored behaviour examples to first order, in nats: -sum of S over the mask / examples."""
    total = sum(float(scores.read("behaviour_signed", name).ravel()[at].sum(dtype=np.float64)) for name, at in mask.indices.items())
    return 0.0 - total / scores.examples["behaviour"]


def empty_mask(scores: Scores) -> Mask:
    """The mask of no weights."""
    return Mask({name: np.zeros(0, np.int64) for name in scores.shapes}, scores.shapes, scores.model, scores.weights)


def run_transfer(
    model: Model,
    masks: Mapping[str, Mask],
    tests: Tests,
    seeds: int = 1,
    table: Table | None = None,
    before: Callable[[], Measured] | None = None,
) -> Table:
    """A row per mask: prune by it, test on every set; random masks of the same counts beside each. `before` as in `run_curve`."""
    table, first = table or Table(TRANSFER_KEY), _first(model, tests, before)
    for name, mask in masks.items():
        trials = [(name, 0, mask), *((f"random like {name}", seed, random_like(mask, seed)) for seed in range(seeds))]
        for label, seed, one in trials:
            if not table.has(label, seed):
                table.add({"mask": label, "seed": seed, **compare(one, first(), measure(apply_mask(model, one), tests))})
    return table


def _first(model: Model, tests: Tests, before: Callable[[], Measured] | None) -> Callable[[], Measured]:
    """What the model as it is measures, found out when it is first asked for."""
    return cache(lambda: before().part(tests) if before else measure(model, tests))
