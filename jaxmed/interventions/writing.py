"""Edits while text is written: which of them act on the prompts' tokens, and which on tokens as they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np

from jaxmed.errors import UserError
from jaxmed.interventions.edit import ANY, CURRENT, Edit, Edits, Where, with_names

ADVICE = 'position="current" means every token as it is written, and no position means all tokens'


def split_edits(edits: Edits, where: str, lengths: Sequence[int], max_tokens: int) -> tuple[dict[str, Edit], dict[str, Edit]]:
    """The edits of the prompts' tokens, and those of the written ones.

    Args:
        edits: checked by `check_edits`.
        where: the tokens that they act on: "both", "prompt", "generated".
        lengths: tokens of every prompt.
        max_tokens: tokens written at most; the last of them is not fed to the model.

    Raises:
        UserError: edits of attention patterns; a position that matches no such token, or that counts from the prompt's end where written
            tokens are meant too.
    """
    if "attention_pattern" in edits:
        raise UserError("Attention patterns cannot be edited while text is written: they grow with it. Use `forward`.")
    for name, edit in edits.items():
        if edit.where is not None:
            _check(name, edit.where, where, np.asarray(lengths), max_tokens)
    prompts = {name: found for name, edit in edits.items() if (found := _kept(edit, False, lengths)) is not None}
    written = {name: found for name, edit in edits.items() if (found := _kept(edit, True, lengths)) is not None}
    return prompts if where != "generated" else {}, written if where != "prompt" else {}


def _check(name: str, entries: Where, where: str, lengths: np.ndarray, max_tokens: int) -> None:
    position, row = (np.asarray(x) for x in np.broadcast_arrays(entries.position, entries.row))
    longest, shortest = (np.where(row == ANY, of(lengths), lengths[np.where(row == ANY, 0, row)]) for of in (np.max, np.min))
    first = np.zeros_like(shortest) if where != "generated" else shortest
    last = longest - 1 if where == "prompt" else longest + max_tokens - 2
    numbered = (position != ANY) & (position != CURRENT)
    if where == "prompt":
        first = np.where(position < 0, -longest, first)
    wrong = numbered & ((position < first) | (position > last)) | ((position == CURRENT) & (where == "prompt"))
    if not wrong.any():
        return
    at = int(np.argmax(wrong))
    if position[at] == CURRENT:
        raise UserError(f'The edit at {name!r} has position="current", a token as it is written, and acts on the prompt alone.')
    why = "matches no token that is read or written"
    if position[at] < 0:
        why = 'counts from the prompt\'s end, where no written token is; act on the prompt alone (where="prompt", --edited prompt)'
    legal = f"legal: {first[at]} to {last[at]}" if first[at] <= last[at] else "no token is written that is fed to the model"
    raise UserError(f"The edit at {name!r} names position {position[at]}, which {why}; {legal}. While generating, {ADVICE}.")


def _kept(edit: Edit, written: bool, lengths: Sequence[int]) -> Edit | None:
    """The entries of an edit that may act on tokens of one kind, "current" standing for any written one; None where there are none."""
    if edit.where is None:
        return edit
    position, row = (np.asarray(x) for x in np.broadcast_arrays(edit.where.position, edit.where.row))
    current, numbered = position == CURRENT, (position != ANY) & (position != CURRENT)
    if written:  # what names a token of every prompt that it is about has acted when writing begins
        shortest = np.where(row == ANY, np.min(lengths), np.asarray(lengths)[np.where(row == ANY, 0, row)])
        kept = ~numbered | (position >= shortest)
    else:
        kept = ~current
    if not kept.any():
        return None
    count = len(position)
    fields: Mapping[str, object] = {
        name: np.asarray(value)[kept] if np.ndim(value) and np.shape(value)[0] == count else value
        for name, value in (("gate", edit.gate), ("value", edit.value), ("add", edit.add))
    }
    anywhere = replace(edit.where, position=np.where(current, ANY, position), names=None)
    return replace(edit, **fields, where=with_names(jax.tree.map(lambda x: np.asarray(x)[kept], anywhere)))
