"""The same positions of many prompts, counted from the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError, quoted
from jaxmed.tokens.positions import locate
from jaxmed.tokens.prompt import Prompt

EVERY = ("all", "each")
"""Words for every token of a prompt."""


def differs(asked: Any) -> bool:
    """Whether positions stand at other places in every prompt."""
    return isinstance(asked, str) and asked not in ("last", *EVERY)


def columns(asked: Any, prompts: Sequence[Prompt | np.ndarray], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coordinate `position`, and int [prompt, position]: columns counted from the right, 0 where a prompt has none."""
    if not differs(asked):
        numbers = _numbers(asked, int(lengths.max()))
        return numbers, np.where(numbers >= -lengths[:, None], numbers, 0)
    found = [_locate(number, prompt, asked) for number, prompt in enumerate(prompts)]
    numbers = np.arange(-max(map(len, found)), 0)
    placed = np.zeros((len(found), len(numbers)), int)
    for row, at, length in zip(placed, found, lengths, strict=True):
        row[len(row) - len(at) :] = np.asarray(at) - length
    return numbers, placed


def _locate(number: int, prompt: Prompt | np.ndarray, word: str) -> list[int]:
    if not isinstance(prompt, Prompt):
        raise UserError(f'Prompt {number} is token ids, which have no place {quoted(word)}. Give it as text, or "last", "all" or numbers.')
    if word == "spans":
        raise UserError('positions is "spans", which pairs alone have. Give a substring instead.')
    try:
        return locate(prompt, word)
    except UserError as error:
        raise UserError(f"Prompt {number}: {error}") from None


def _numbers(asked: str | int | Sequence[int], longest: int) -> np.ndarray:
    if isinstance(asked, str) and asked in EVERY:
        return np.arange(-longest, 0)
    numbers = np.atleast_1d(np.asarray(-1 if isinstance(asked, str) else asked))
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.ndim != 1 or not numbers.size or len(np.unique(numbers)) < numbers.size:
        fix = '"last", "all", a word or substring, or different whole numbers from the right, such as -1'
        raise UserError(f"positions is {quoted(asked)}; legal: {fix}.")
    if (wrong := numbers[(numbers >= 0) | (numbers < -longest)]).size:
        raise UserError(f"No prompt has position {wrong[0]}: positions count from the right, here from -{longest} to -1.")
    return numbers.astype(int)
