"""Batches of a scoring pass: one example a row, because every example's own gradient is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from jaxmed.batching.batches import Batch, Shape, make_batch
from jaxmed.tokens import TokenizedExample, bucket

FEWEST = 0.1
"""A bucket of lengths that holds a smaller share of the examples is put into the next one: every bucket is compiled anew."""


@dataclass(frozen=True)
class Group:
    """Examples that run in batches of one shape."""

    members: np.ndarray
    shape: Shape


def group(examples: Sequence[TokenizedExample], devices: int, tokens_per_device: int, rows: int = 0) -> list[Group]:
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


def batches(examples: Sequence[TokenizedExample], groups: Sequence[Group]) -> Iterator[tuple[np.ndarray, Batch]]:
    """(example numbers, batch) of a pass; the weights of an example's scored tokens add up to one, those of empty rows to zero."""
    for one in groups:
        for at in range(0, len(one.members), one.shape.rows):
            members = one.members[at : at + one.shape.rows]
            batch = make_batch(examples, members, one.shape, False)
            yield members, replace(batch, weight=batch.weight / np.maximum(batch.weight.sum(-1, keepdims=True), 1))
