"""Examples as the token batches that are scored: one example a row, every example of equal weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.finetuning.batches import Batch, Shape, make_batch
from jaxmed.prompts.examples import Example
from jaxmed.tokens import Answered, bucket, encode_example

FORMS: dict[str, tuple[str, str]] = {"plain": ("{}", "\n"), "space": ("{}", " "), "qa": ("Q: {}\nA:", " "), "chat": ("{}", "")}
"""How prompt and response are joined: what the prompt becomes, and what stands between; "chat" is the model's chat template."""
FEWEST = 0.1
"""A bucket of lengths that holds a smaller share of the examples is put into the next one: every bucket is compiled anew."""


def encode(
    tokenizer: Any, examples: Sequence[Example], form: str = "plain", scored_separator: bool = False, most: int = 0
) -> list[Answered]:
    """Examples as tokens, without begin-of-sequence but in "chat".

    Args:
        scored_separator: whether what stands between prompt and response is scored with the response.
        most: limit of an example's tokens; what is longer loses its end.

    Raises:
        UserError: an unknown form; no examples; one without response, or whose prompt leaves no room for it.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if not examples:
        raise UserError("There are no examples to score.")
    around, separator = FORMS[form]
    found = []
    for example in examples:
        asked = replace(example, prompt=around.format(example.prompt))
        one = encode_example(tokenizer, asked, form != "chat", most or None, separator)
        if scored_separator and form != "chat":
            alone = tokenizer(asked.prompt, add_special_tokens=False)["input_ids"]
            one = replace(one, prompt=max(1, min(len(alone), one.prompt - 1)))
        found.append(one)
    return found


@dataclass(frozen=True)
class Group:
    """Examples that run in batches of one shape."""

    members: np.ndarray
    shape: Shape


def group(examples: Sequence[Answered], devices: int, tokens_per_device: int, rows: int = 0) -> list[Group]:
    """Examples by bucket of length; batches have one example per row and as many rows per device as fit.

    Args:
        tokens_per_device: most tokens of a batch on a device (one row may exceed it).
        rows: rows per device, instead.
    """
    sizes = np.asarray([bucket(len(example.ids)) for example in examples])
    legal = sorted(set(sizes.tolist()))
    for small, larger in pairwise(legal):
        if (sizes == small).sum() < FEWEST * len(sizes):
            sizes[sizes == small] = larger
    groups = []
    for size in sorted(set(sizes.tolist())):
        members = np.nonzero(sizes == size)[0]
        scored = bucket(max(len(examples[i].ids) - examples[i].prompt for i in members.tolist()))
        each = rows or max(1, tokens_per_device // size)
        count = devices * min(each, -(-len(members) // devices))
        groups.append(Group(members, Shape(count, 0, 1, int(size), scored)))
    return groups


def count_batches(groups: Sequence[Group]) -> int:
    """How many batches a pass over the groups has."""
    return sum(math.ceil(len(one.members) / one.shape.rows) for one in groups)


def batches(examples: Sequence[Answered], groups: Sequence[Group]) -> Any:
    """(example numbers, batch) of a pass; the weights of an example's scored tokens add up to one, those of empty rows to zero."""
    for one in groups:
        for at in range(0, len(one.members), one.shape.rows):
            members = one.members[at : at + one.shape.rows]
            batch = make_batch(examples, members, one.shape, False)
            yield members, replace(batch, weight=batch.weight / np.maximum(batch.weight.sum(-1, keepdims=True), 1))


def response_tokens(batch: Batch) -> np.ndarray:
    """float32 [B,T]: 1 at tokens of responses."""
    found = np.zeros(batch.tokens.shape, np.float32)
    rows, at = np.nonzero(batch.weight > 0)
    found[rows, batch.column[rows, at] + 1] = 1
    return found
