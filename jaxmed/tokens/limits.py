"""Token ids and lengths against what a model takes: checked once, where they enter, before any program runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxmed.errors import UserError, notice
from jaxmed.memory import host_bytes


def check_tokens(config: Any, rows: Iterable[Any], what: str = "The text", tokenizer: Any = None, more: int = 0) -> None:
    """Refuses what the model has no embedding or no position for.

    Args:
        config: the model's `ModelConfig`.
        rows: token ids int [T] each.
        what: what the rows are, for the messages.
        tokenizer: names the tokens in the messages.
        more: tokens that will follow every row.

    Raises:
        UserError: an id outside the embedding; more tokens than learned positions. More tokens than the model was made for are told where
            its positions are rotary.
    """
    longest = 0
    for row in rows:
        ids = np.asarray(row).reshape(-1)
        wrong = ids[(ids < 0) | (ids >= config.vocabulary)]
        if len(wrong):
            named = f" ({tokenizer.convert_ids_to_tokens(int(wrong[0]))!r})" if tokenizer is not None else ""
            raise UserError(
                f"{what} holds the token id {wrong[0]}{named}; this model's embedding has rows for 0 to "
                f"{config.vocabulary - 1}. The tokenizer is another model's, or tokens were added to it and the embedding was not resized."
            )
        longest = max(longest, len(ids))
    check_length(config, longest + more, what)


def check_length(config: Any, length: int, what: str = "The text") -> None:
    """Refuses more tokens than the model has learned positions for, or than memory holds keys and values of; tells of more than it was made
    for where positions are rotary."""
    if length <= config.max_length:
        return
    size = 2 * length * config.layers * config.kv_heads * config.head_width * (2 if config.dtype == "bfloat16" else 4)
    if size > host_bytes():
        held = f"this machine has {host_bytes() / 1e9:,.1f} GB of memory"
        raise UserError(f"{what}: {length:,} tokens, whose keys and values take {size / 1e9:,.0f} GB; {held}. Give fewer tokens.")
    if config.rope is None:
        raise UserError(f"{what}: {length} tokens, and this model has learned positions for {config.max_length}. Shorten the text.")
    made = f"the {config.max_length} this model was made for (rotary positions, scaling {config.rope.scaling})"
    notice(f"{what}: {length} tokens exceed {made}; what it says there may be worse.")
