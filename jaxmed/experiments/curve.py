"""Experiments over masks: a behaviour against the fraction of pruned weights, and the transfer of masks between behaviours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.experiments.measure import Measurement, Tests, compare, measure
from jaxmed.experiments.table import Examples, Table
from jaxmed.experiments.trials import Trial, beside_random, mask_trial, once, run_trials
from jaxmed.files import Row
from jaxmed.models.model import Model
from jaxmed.models.named_weights import weights_by_name
from jaxmed.pruning.job import token_digest
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.rule import SCORES, Rule
from jaxmed.pruning.scores import Scores
from jaxmed.pruning.selection import needs_weights, random_like, select
from jaxmed.tokens import TokenizedExample

CURVE, TRANSFER = "curve.csv", "transfer.csv"
CURVE_KEY, TRANSFER_KEY = ("rule", "q", "seed"), ("mask", "seed")
EXAMPLES = "examples.csv"
"""Losses of single examples behind a curve."""
SAME_COUNTS = "random"
"""The baseline that draws as many weights of every matrix as the first rule chose."""


@dataclass(frozen=True)
class CurveRequest:
    """Which masks a curve goes through.

    Attributes:
        rule, qs: the rule, and its fractions of chosen weights.
        against: other scores by which as many weights are chosen.
        seeds: draws of the random baseline.
        preserve: scores of a preserve set that was scored apart; None: those in `scores`.
    """

    scores: Scores
    rule: Rule
    qs: Sequence[float]
    against: Sequence[str] = (SAME_COUNTS,)
    seeds: int = 1
    preserve: Scores | None = None

    @property
    def count(self) -> int:
        """How many masks there are, beside the empty one."""
        return len(self.qs) * (1 + sum(self.seeds if score == SAME_COUNTS else 1 for score in self.against))

    def check(self, model: Model) -> None:
        """Raises a UserError for values out of range, and for scores of other weights or without a kind that a rule reads."""
        scores, rule = self.scores, self.rule
        if not self.qs:
            raise UserError("A curve needs at least one fraction of weights: give --qs.")
        if self.seeds < 0:
            raise UserError(f"There cannot be {self.seeds} draws of random masks. Give --seeds 0 or more.")
        for score in self.against:
            if score not in SCORES:
                raise unknown("rule to compare with", score, SCORES)
        if scores.weights != model.identity:
            raise UserError(f"The scores are of other weights ({scores.model!r}) than {model.name!r} has. Score this model first.")
        for q in self.qs:
            replace(rule, q=q).check()
        for one in (rule.score, *self.against):
            kinds = needed_kinds(replace(rule, q=self.qs[0], score=one))
            held = {kind: (self.preserve or scores if kind.startswith("preserve") else scores).kinds for kind in kinds}
            missing = [kind for kind in kinds if kind not in held[kind]]
            if missing:
                raise UserError(f"The rule {one!r} reads {missing[0]!r}, which was not scored. Score again with --kinds {' '.join(kinds)}.")

    def masks(self, weights: Mapping[str, np.ndarray] | None) -> Iterator[tuple[tuple[str, float, int], Mask]]:
        """((rule's score, q, seed), mask): the empty one; then for every q that of the rule, and of the others at the same q and p."""
        yield ("none", 0.0, 0), empty_mask(self.scores)
        for q in self.qs:
            first = select(self.scores, replace(self.rule, q=q), weights, preserve=self.preserve)
            yield (self.rule.score, q, 0), first
            for score in self.against:
                if score == SAME_COUNTS:
                    yield from (((score, q, seed), random_like(first, seed)) for seed in range(self.seeds))
                else:
                    yield (score, q, 0), select(self.scores, replace(self.rule, q=q, score=score), weights, preserve=self.preserve)

    def weights(self, model: Model) -> Mapping[str, np.ndarray] | None:
        """The model's weights, where a rule reads them."""
        rules = [replace(self.rule, q=self.qs[0], score=score) for score in (self.rule.score, *self.against)]
        return weights_by_name(model) if any(needs_weights(one) for one in rules) else None


def run_curve(
    model: Model,
    request: CurveRequest,
    tests: Tests,
    table: Table | None = None,
    examples: Examples | None = None,
    before: Callable[[], Measurement] | None = None,
) -> Table:
    """A row per mask: `rule`, `q`, `seed`, the rise of the scored examples' loss to first order, and what `compare` gives.

    The first row is the model as it is.

    Args:
        table: keeps the rows; those it holds are not measured again.
        examples: keeps the losses of single examples.
        before: what the model as it is measures on the test sets, and perhaps on more.

    Raises:
        UserError: values out of range; scores of other weights than the model's.
    """
    request.check(model)
    first, kept = once(model, tests, before), examples or Examples(CURVE_KEY)
    signed = "behaviour_signed" in request.scores.kinds

    def measured(trial: Trial, pruned: Model) -> Row:
        after = first() if pruned is model else measure(pruned, tests)
        kept.add(trial.key, after.losses)
        return compare(first(), after)

    trials = (
        mask_trial(model, key, mask, {"first_order": predicted_rise(request.scores, mask)} if signed else {})
        for key, mask in request.masks(request.weights(model))
    )
    return run_trials(trials, measured, table or Table(CURVE_KEY))


def needed_kinds(rule: Rule) -> list[str]:
    """The kinds of scores that a rule reads."""
    of_behaviour = {"signed": "signed", "positive": "signed", "absolute": "absolute", "wanda": "inputs"}.get(rule.score)
    of_preserve = {"absolute": "absolute", "wanda": "inputs"}.get(rule.spare) if rule.p else None
    return [f"{which}_{kind}" for which, kind in (("behaviour", of_behaviour), ("preserve", of_preserve)) if kind]


def check_scored(scores: Scores, examples: Sequence[TokenizedExample]) -> None:
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
    before: Callable[[], Measurement] | None = None,
) -> Table:
    """A row per mask: prune by it, test on every set; random masks of the same counts beside each. `before` as in `run_curve`."""
    first = once(model, tests, before)
    trials = (mask_trial(model, key, mask) for key, mask in beside_random(masks, seeds))
    return run_trials(trials, lambda _, pruned: compare(first(), measure(pruned, tests)), table or Table(TRANSFER_KEY))
