"""A model's answers as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxmed.generation import generate
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.tokens import check_tokens, prompt_ids


def check_answers(model: Model, examples: Sequence[Example], max_tokens: int, form: str = "chat") -> None:
    """Refuses what `answer` would, before weights are loaded.

    Raises:
        UserError: prompts that the model cannot read, or answers that it has no room for.
    """
    prompts = [prompt_ids(model.tokenizer, one, form) for one in examples]
    check_tokens(model.config, prompts, "A prompt with its answer", model.tokenizer, max_tokens)


def answer(model: Model, examples: Sequence[Example], max_tokens: int = 32, form: str = "chat", **how: Any) -> list[str]:
    """The model's answer to every prompt, as text; greedy unless `how` (as `generate_ids` takes it) says otherwise.

    Args:
        max_tokens: of an answer.
        form: how prompts are written; see `prompts.forms`.
    """
    return generate(model, examples, max_tokens, form, **how)
