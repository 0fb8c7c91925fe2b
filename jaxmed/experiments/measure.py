"""What a mask does: losses on sets of examples and perplexity on plain text, before and after, with intervals over examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.batching.scoring import example_losses
from jaxmed.batching.texts import encode
from jaxmed.evaluation.perplexity import Perplexity, perplexity, perplexity_ratio
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.statistics import mean_interval
from jaxmed.tokens import TokenizedExample


@dataclass(frozen=True)
class Tests:
    """What a model is measured on.

    Attributes:
        sets: name -> examples as tokens.
        text: plain text file or bundled text for the perplexity; empty: none.
    """

    sets: Mapping[str, Sequence[TokenizedExample]]
    text: str = "neutral"


def make_tests(model: Model, sets: Mapping[str, Sequence[Example]], text: str = "neutral", **how: Any) -> Tests:
    """Tests from examples with responses; `how` as `texts.encode` takes it."""
    return Tests({name: encode(model.tokenizer, found, **how) for name, found in sets.items()}, text)


@dataclass(frozen=True)
class Measurement:
    """Losses of a model.

    Attributes:
        losses: set -> loss of every example.
        perplexity: on plain text, or None.
    """

    losses: Mapping[str, np.ndarray]
    perplexity: Perplexity | None

    def part(self, tests: Tests) -> Measurement:
        """The subset of these measurements that `tests` asks for."""
        return Measurement({name: self.losses[name] for name in tests.sets}, self.perplexity if tests.text else None)


def measure(model: Model, tests: Tests) -> Measurement:
    """Losses of every test set, and the perplexity. A set is packed by itself, so that two models are rounded alike."""
    losses = {name: example_losses(model, found) for name, found in tests.sets.items()}
    return Measurement(losses, perplexity(model, tests.text) if tests.text else None)


def compare(before: Measurement, after: Measurement) -> dict[str, Any]:
    """A row of numbers: for every test set the loss, its rise and the rise's 95 % interval; the perplexity and its ratio."""
    row: dict[str, Any] = {}
    for name, losses in after.losses.items():
        rise = losses - before.losses[name]
        low, high = map(float, mean_interval(rise))
        row |= {f"{name}_loss": float(losses.mean()), f"{name}_rise": float(rise.mean()), f"{name}_low": low, f"{name}_high": high}
    if before.perplexity is not None and after.perplexity is not None:
        ratio, low, high = perplexity_ratio(before.perplexity, after.perplexity)
        row |= {"perplexity": after.perplexity.value, "perplexity_ratio": ratio, "perplexity_low": low, "perplexity_high": high}
    return row
