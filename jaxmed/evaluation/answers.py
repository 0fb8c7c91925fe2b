"""A model's answers, and how often it refuses, by kind and category of request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from jaxmed.evaluation.refusals import is_refusal
from jaxmed.generation import generate
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example


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


def answer(model: Model, examples: Sequence[Example], most: int = 32, form: str = "chat", **how: Any) -> list[str]:
    """The model's answer to every prompt, as text; greedy unless `how` (as `generate_ids` takes it) says otherwise.

    Args:
        most: tokens of an answer.
        form: how prompts are written; see `prompts.forms`.
    """
    return generate(model, examples, most, form, **how)


def rate(name: str, refused: Sequence[bool]) -> Rate:
    """The share of refusals with its interval."""
    low, high = stats.binomtest(sum(refused), len(refused)).proportion_ci(method="wilson")
    return Rate(name, sum(refused), len(refused), float(low), float(high))


def refusal_rates(examples: Sequence[Example], answers: Sequence[str], by: str = "kind", short: int = 0) -> list[Rate]:
    """Refusal rates of every value of a column, in order of appearance."""
    groups: dict[str, list[bool]] = {}
    for example, text in zip(examples, answers, strict=True):
        groups.setdefault(getattr(example, by) or "all", []).append(is_refusal(text, short))
    return [rate(name, refused) for name, refused in groups.items()]
