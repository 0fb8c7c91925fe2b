"""A model's answers as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxmed.generation import generate
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example


def answer(model: Model, examples: Sequence[Example], max_tokens: int = 32, form: str = "chat", **how: Any) -> list[str]:
    """The model's answer to every prompt, as text; greedy unless `how` (as `generate_ids` takes it) says otherwise.

    Args:
        max_tokens: of an answer.
        form: how prompts are written; see `prompts.forms`.
    """
    return generate(model, examples, max_tokens, form, **how)
