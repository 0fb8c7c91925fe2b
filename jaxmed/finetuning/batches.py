"""Examples into batches: the order of the data, rows of one or several examples, and which tokens are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmed.interventions.edits import TokenIndex
from jaxmed.runner import Layout
from jaxmed.tokens import BUCKETS, Answered, bucket


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What one optimiser step sees; a leading axis of microbatches may stand before all of these.

    Attributes:
        tokens: int [B, T], rows of one example each or of several.
        position: int [B, T], from zero within each example.
        segment: int [B, T], number of the example within its row, from one; 0 is padding. Examples do not see each other.
        column: int [B, R], columns whose next token is scored.
        target: int [B, R], that token.
        weight: float32 [B, R], 1, or 0 where a row has fewer scored tokens.
    """

    tokens: Any
    position: Any
    segment: Any
    column: Any
    target: Any
    weight: Any


def batch_layout(batch: Batch) -> Layout:
    """How the tokens of a batch see each other: earlier ones of their own example."""
    column = np.arange(batch.tokens.shape[-1])
    same = batch.segment[:, :, None] == batch.segment[:, None, :]
    visible = same & (column[:, None] >= column)
    return Layout(batch.position, visible, TokenIndex(batch.position, batch.tokens.shape[-1]))


@dataclass(frozen=True)
class Shape:
    """Sizes that all batches of a run share, so that one program serves them: rows, tokens per row, scored tokens per row."""

    rows: int
    length: int
    scored: int


def epochs(count: int, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """Example numbers of every optimiser step: each epoch is a new permutation; the last batch of an epoch may be smaller."""
    chosen: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    while len(chosen) < steps:
        order = rng.permutation(count)
        chosen += [order[at : at + batch] for at in range(0, count, batch)]
    return chosen[:steps]


def fill_rows(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Packs examples into rows of `row` tokens: each goes into the first row that has room (longest first)."""
    rows: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        at = next((i for i, room in enumerate(free) if room >= lengths[number]), len(rows))
        if at == len(rows):
            rows.append([])
            free.append(row)
        rows[at].append(number)
        free[at] -= lengths[number]
    return [sorted(held) for held in rows]


def choose_shape(examples: Sequence[Answered], groups: Sequence[np.ndarray], packing: bool, devices: int, per_key: float) -> Shape:
    """The shape that costs least over all groups of examples (one group is one forward pass).

    Args:
        devices: rows are a multiple of it.
        per_key: cost of attention to one more token, relative to a token's matmuls of weights.
    """
    lengths = [len(example.ids) for example in examples]
    longest = bucket(max(lengths))
    found: dict[int, tuple[float, int, int]] = {}
    for row in [size for size in BUCKETS if longest <= size <= 4 * longest] if packing else [longest]:
        packed = [_rows(examples, group, row, packing) for group in groups]
        rows = -(-max(len(held) for held in packed) // devices) * devices
        scored = max(sum(len(examples[i].ids) - examples[i].prompt for i in held) for group in packed for held in group)
        found[row] = rows * row * (1 + per_key * row), rows, scored
    length = min(found, key=lambda row: found[row][0])
    return Shape(found[length][1], length, -(-found[length][2] // 8) * 8)


def _rows(examples: Sequence[Answered], group: np.ndarray, row: int, packing: bool) -> list[list[int]]:
    """Example numbers of every row."""
    if not packing:
        return [[int(number)] for number in group]
    return [[int(group[i]) for i in held] for held in fill_rows([len(examples[n].ids) for n in group], row)]


def make_batch(examples: Sequence[Answered], group: np.ndarray, shape: Shape, packing: bool) -> Batch:
    """The examples of `group` as rows."""
    size, scored = (shape.rows, shape.length), (shape.rows, shape.scored)
    tokens, position, segment = (np.zeros(size, np.int32) for _ in range(3))
    column, target, weight = np.zeros(scored, np.int32), np.zeros(scored, np.int32), np.zeros(scored, np.float32)
    for row, held in enumerate(_rows(examples, group, shape.length, packing)):
        begin = filled = 0
        for number, index in enumerate(held, 1):
            example = examples[index]
            here = slice(begin, begin + len(example.ids))
            tokens[row, here], position[row, here], segment[row, here] = example.ids, np.arange(len(example.ids)), number
            response = np.arange(example.prompt, len(example.ids))
            there = slice(filled, filled + len(response))
            column[row, there], target[row, there], weight[row, there] = begin + response - 1, example.ids[response], 1
            begin, filled = here.stop, there.stop
    return Batch(tokens, position, segment, column, target, weight)


def microbatches(group: np.ndarray, count: int) -> list[np.ndarray]:
    """A step's examples in `count` parts of as equal sizes as can be."""
    return [part for part in np.array_split(group, count)]


def stack(batches: Sequence[Batch]) -> Batch:
    """Several batches of one shape with a leading axis."""
    return jax.tree.map(lambda *parts: np.stack(parts), *batches)


def scored_tokens(examples: Sequence[Answered], group: np.ndarray) -> int:
    """Response tokens of a group."""
    return sum(len(examples[i].ids) - examples[i].prompt for i in group)


def count_steps(count: int, batch: int, epoch_count: float) -> int:
    """Optimiser steps of `epoch_count` epochs."""
    return max(1, math.ceil(epoch_count * -(-count // batch) - 1e-9))
