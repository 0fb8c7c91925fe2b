"""How often answers refuse, and what they score on average: by kind or category of request, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from jaxmed.evaluation.refusals import is_refusal
from jaxmed.prompts.examples import Example
from jaxmed.statistics.intervals import EVERYTHING, mean_interval, wilson

T = TypeVar("T")


@dataclass(frozen=True)
class Rate:
    """How many of some answers refuse.

    Attributes:
        low, high: 95 % Wilson score interval of the fraction (Wilson 1927).
    """

    name: str
    refused: int
    answers: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.refused / self.answers


@dataclass(frozen=True)
class Mean:
    """The mean score of a group of answers.

    Attributes:
        low, high: 95 % interval over answers; NaN below `statistics.FEWEST_FOR_INTERVAL`.
        unjudged: answers without a score; they are left out.
    """

    name: str
    value: float
    answers: int
    low: float
    high: float
    unjudged: int = 0


def rate(name: str, refused: Sequence[bool]) -> Rate:
    """The fraction of refusals with its interval."""
    low, high = wilson(sum(refused), len(refused))
    return Rate(name, sum(refused), len(refused), low, high)


def refusal_rates(examples: Sequence[Example], answers: Sequence[str], by: str = "kind", short: int = 0) -> list[Rate]:
    """Refusal rates of every value of a column, in order of appearance."""
    return rates_of(examples, [float(is_refusal(text, short)) for text in answers], by)


def rates_of(examples: Sequence[Example], scores: Sequence[float | None], by: str = "kind") -> list[Rate]:
    """Refusal rates out of the scores of `judges.refusal_rules`."""
    return [rate(name, [bool(score) for score in found]) for name, found in _groups(examples, scores, by).items()]


def mean_score(name: str, scores: Sequence[float | None], legal: tuple[float, float] = EVERYTHING) -> Mean:
    """The mean of the scores there are, with its interval, which stays within what is `legal`."""
    kept = np.array([score for score in scores if score is not None])
    value = float(kept.mean()) if len(kept) else math.nan
    low, high = mean_interval(kept, legal=legal)
    return Mean(name, value, len(kept), float(low), float(high), len(scores) - len(kept))


def mean_scores(examples: Sequence[Example], scores: Sequence[float | None], by: str = "kind") -> list[Mean]:
    """Mean scores of every value of a column, in order of appearance."""
    return [mean_score(name, found, (0.0, 1.0)) for name, found in _groups(examples, scores, by).items()]


def _groups(examples: Sequence[Example], values: Sequence[T], by: str) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for example, value in zip(examples, values, strict=True):
        groups.setdefault(getattr(example, by) or "all", []).append(value)
    return groups
