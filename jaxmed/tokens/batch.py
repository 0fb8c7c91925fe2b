"""Ragged prompts as one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError, quoted
from jaxmed.tokens.prompt import Asked, render


def batch(model: Any, prompts: Sequence[Asked], form: str = "chat") -> tuple[np.ndarray, np.ndarray]:
    """Texts, examples or chats as the token ids of one batch, padded at the left.

        ids, padding = jm.tokens.batch(model, ["Why is the sky blue?", "Hi"])
        logits, _ = jm.forward(model, ids, padding=padding)

    Args:
        model: a model, or its tokenizer.
        form: a name in `prompts.forms.FORMS`.

    Returns:
        ids int32 [B, T], and padding int32 [B], how many tokens at the left of each row are padding.

    Raises:
        UserError: what `render` and `pad` raise.
    """
    check_several(prompts)
    return pad([render(model, prompt, form=form).ids for prompt in prompts])


def check_several(prompts: Any) -> None:
    """Raises a UserError for one text in the place of a list: its letters would be prompts."""
    if isinstance(prompts, str):
        raise UserError(f"prompts is a list of texts: write [{quoted(prompts)}].")


def pad(prompts: Sequence[np.ndarray], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts as one array, padded at the left.

    Args:
        prompts: token ids int [T] each.
        length: columns of the array; by default the longest prompt's.

    Returns:
        ids int32 [B, T], and padding int32 [B], how many tokens at the left of each row are padding: what `jm.forward` takes.

    Raises:
        UserError: no prompts, one without tokens, or one longer than `length`.
    """
    rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    sizes = np.asarray([len(row) for row in rows], np.int32)
    if not rows or not sizes.min():
        raise UserError("There is no prompt to pad." if not rows else f"Prompt {int(sizes.argmin())} has no tokens.")
    length = int(sizes.max()) if length is None else length
    if sizes.max() > length:
        raise UserError(f"Prompt {int(sizes.argmax())} has {sizes.max()} tokens; they do not fit into {length} columns.")
    ids = np.zeros((len(rows), length), np.int32)
    for at, row in enumerate(rows):
        ids[at, length - len(row) :] = row
    return ids, length - sizes
