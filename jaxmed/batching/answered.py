"""Several responses to one prompt as one example, so that the prompt runs once: as many FLOPs as continuing its cached keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmed.tokens import TokenizedExample


@dataclass(frozen=True)
class Answered(TokenizedExample):
    """A prompt and the responses to it, one behind the other in `ids`; `begins`: where each of them does, ascending."""

    begins: tuple[int, ...] = ()


def laid_out(example: TokenizedExample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How an example's tokens stand.

    Returns:
        int [T], their positions: every response goes on where the prompt ends;
        int [T], the number of their response, from one where there are several; else 0, and 0 in the prompt;
        int [T - prompt], for every response token, which one it follows.
    """
    place = np.arange(len(example.ids))
    before = place[example.prompt :] - 1
    if not isinstance(example, Answered):
        return place, np.zeros_like(place), before
    part = np.searchsorted(example.begins, place, side="right")
    begin = np.asarray([example.prompt, *example.begins])[part]
    before = np.where(np.isin(place[example.prompt :], example.begins), example.prompt - 1, before)
    return place - (begin - example.prompt), part, before


def by_prompt(examples: Sequence[TokenizedExample], numbers: Iterable[int], most: int) -> list[tuple[TokenizedExample, list[int]]]:
    """(example, numbers of those that it stands for): examples of one prompt together, as long as they have `most` tokens at most.

    Args:
        numbers: which of `examples` are taken.
    """
    held: dict[bytes, list[list[int]]] = {}
    for number in numbers:
        example = examples[number]
        lots = held.setdefault(example.ids[: example.prompt].tobytes(), [])
        own = len(example.ids) - example.prompt
        last = sum(len(examples[i].ids) - example.prompt for i in lots[-1]) + example.prompt if lots else 0
        if lots and last + own <= most:
            lots[-1].append(number)
        else:
            lots.append([number])
    return [(_together([examples[i] for i in lot]), lot) for lots in held.values() for lot in lots]


def _together(examples: Sequence[TokenizedExample]) -> TokenizedExample:
    first = examples[0]
    if len(examples) == 1:
        return first
    lengths = [len(example.ids) - example.prompt for example in examples]
    begins = first.prompt + np.cumsum([0, *lengths[:-1]])
    ids = np.concatenate([first.ids, *(example.ids[example.prompt :] for example in examples[1:])])
    return Answered(ids, first.prompt, begins=tuple(begins.tolist()))
