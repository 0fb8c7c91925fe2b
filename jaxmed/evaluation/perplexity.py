"""Perplexity on plain text, and the ratio of two with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.batching.scoring import check_everywhere, score_responses
from jaxmed.errors import UserError
from jaxmed.interventions.edits import Edit
from jaxmed.models.model import Model
from jaxmed.prompts.readers import read_text
from jaxmed.statistics import ratio_interval
from jaxmed.tokens import TokenizedExample, text_ids

__all__ = ["SEGMENT", "Perplexity", "check_everywhere", "perplexity", "perplexity_ratio", "segments"]

SEGMENT = 512
"""Tokens of plain text that see each other when perplexity is measured."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss per token.

    Attributes:
        tokens: how many were predicted.
        losses: mean loss of each paragraph in nats, and its tokens: [paragraphs, 2], for paired comparisons.
    """

    value: float
    tokens: int
    losses: np.ndarray

    @classmethod
    def of(cls, losses: np.ndarray) -> Perplexity:
        """From paragraphs' mean losses and tokens float64 [paragraphs, 2]."""
        count = losses[:, 1].sum()
        return cls(math.exp(losses.prod(axis=1).sum() / count), int(count), losses)


def segments(tokenizer: Any, source: str | Path) -> list[tuple[int, Any]]:
    """(paragraph, token ids) of what is scored of a text: at most `SEGMENT` tokens each.

    Raises:
        UserError: no such file, or one without text.
    """
    paragraphs = [part.strip() for part in read_text(source).split("\n\n") if part.strip()]
    ids = [text_ids(tokenizer, part) for part in paragraphs]
    cut = [(number, one[at : at + SEGMENT]) for number, one in enumerate(ids) for at in range(0, len(one), SEGMENT)]
    cut = [(number, one) for number, one in cut if len(one) > 1]
    if not cut:
        raise UserError(f"{source} holds no text to predict: paragraphs of at least two tokens are needed.")
    return cut


def perplexity(model: Model, source: str | Path, edits: Mapping[str, Edit] | None = None) -> Perplexity:
    """Perplexity on a text file, or on the bundled text "neutral": paragraphs between blank lines, each on its own, without chat template.

    A paragraph of more than `SEGMENT` tokens is cut into such segments.

    Args:
        edits: interventions at every token.

    Raises:
        UserError: no such file, or one without text; edits that name positions, rows or pairs of tokens.
    """
    cut = segments(model.tokenizer, source)
    losses = np.zeros((cut[-1][0] + 1, 2))
    found = score_responses(model, [TokenizedExample(np.asarray(one, np.int32), 1) for _, one in cut], edits=edits)
    for (number, one), scored in zip(cut, found, strict=True):
        losses[number] += -scored.log_probabilities.sum(dtype=np.float64), len(one) - 1
    kept = losses[losses[:, 1] > 0]
    return Perplexity.of(np.stack([kept[:, 0] / kept[:, 1], kept[:, 1]], axis=1))


def perplexity_ratio(before: Perplexity, after: Perplexity) -> tuple[float, float, float]:
    """Perplexity after over before, and its 95 % interval over paragraphs, which are the same in both; NaN where they are too few."""
    tokens = before.losses[:, 1]
    rise = ratio_interval((after.losses[:, 0] - before.losses[:, 0]) * tokens, tokens)
    ratio, low, high = (math.exp(end) for end in rise)
    return ratio, low, high
