"""How often answers refuse, and what they score on average: by kind or category of request, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

from jaxmed.evaluation.refusals import is_refusal
from jaxmed.prompts.examples import Example

T = TypeVar("T")
FEWEST = 10
"""Below, a mean has no interval: too few to resample."""


@dataclass(frozen=True)
class Rate:
    """How many of some answers refuse.

    Attributes:
        low, high: 95 % Wilson score interval of the share (Wilson 1927).
    """

    name: str
    refused: int
    answers: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.refused / self.answers


@dataclass(frozen=True)
class Mean:
    """The mean score of a group of answers.

    Attributes:
        low, high: 95 % BCa bootstrap interval over answers; NaN below `FEWEST`.
        unjudged: answers without a score; they are left out.
    """

    name: str
    value: float
    answers: int
    low: float
    high: float
    unjudged: int = 0


def rate(name: str, refused: Sequence[bool]) -> Rate:
    """The share of refusals with its interval."""
    low, high = stats.binomtest(sum(refused), len(refused)).proportion_ci(method="wilson")
    return Rate(name, sum(refused), len(refused), float(low), float(high))


def refusal_rates(examples: Sequence[Example], answers: Sequence[str], by: str = "kind", short: int = 0) -> list[Rate]:
    """Refusal rates of every value of a column, in order of appearance."""
    return rates_of(examples, [float(is_refusal(text, short)) for text in answers], by)


def rates_of(examples: Sequence[Example], scores: Sequence[float | None], by: str = "kind") -> list[Rate]:
    """Refusal rates out of the scores of `judges.refusal_rules`."""
    return [rate(name, [bool(score) for score in found]) for name, found in _groups(examples, scores, by).items()]


def mean_score(name: str, scores: Sequence[float | None], resamples: int = 2000, seed: int = 0) -> Mean:
    """The mean of the scores there are, with its interval."""
    kept = np.array([score for score in scores if score is not None])
    value, unjudged = float(kept.mean()) if len(kept) else math.nan, len(scores) - len(kept)
    if len(kept) < FEWEST:
        return Mean(name, value, len(kept), math.nan, math.nan, unjudged)
    if np.ptp(kept) == 0:
        return Mean(name, value, len(kept), value, value, unjudged)
    found = stats.bootstrap((kept,), np.mean, n_resamples=resamples, method="BCa", rng=seed).confidence_interval
    return Mean(name, value, len(kept), float(found.low), float(found.high), unjudged)


def mean_scores(examples: Sequence[Example], scores: Sequence[float | None], by: str = "kind") -> list[Mean]:
    """Mean scores of every value of a column, in order of appearance."""
    return [mean_score(name, found) for name, found in _groups(examples, scores, by).items()]


def _groups(examples: Sequence[Example], values: Sequence[T], by: str) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for example, value in zip(examples, values, strict=True):
        groups.setdefault(getattr(example, by) or "all", []).append(value)
    return groups
