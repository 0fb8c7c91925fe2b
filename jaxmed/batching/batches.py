"""Examples into batches: the order of the data, where each example lies, and which tokens are scored.

A device gets one row: the tokens that all examples begin with (the chat template's opening), once, and behind them branches that see
them and themselves alone. A branch holds one example, or several that do not see each other. Causal attention makes this exact: what all
examples begin with does not depend on what follows, and its gradient is the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import jax
import numpy as np

from jaxmed.batching.answered import Answered, laid_out
from jaxmed.interventions.edits import TokenIndex
from jaxmed.models.config import ModelConfig
from jaxmed.runner import Layout
from jaxmed.tokens import TokenizedExample, bucket

ATTENTION_COST = 4.0
"""Time of attention's FLOPs against those of the weights' matmuls, softmax included; it decides how long rows are packed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What one optimiser step sees; a leading axis of microbatches may stand before all of these.

    Attributes:
        tokens: int [B, T], rows of a trunk and branches; `trunk` tokens and then branches of `branch` tokens.
        position: int [B, T], from zero within each example.
        segment: int [B, T], number of the example within its branch, from one; 0 is padding. Examples do not see each other.
        column: int [B, R], columns whose next token is scored.
        target: int [B, R], that token.
        weight: float32 [B, R], 1, or 0 where a row has fewer scored tokens.
        h: float32 [B, T, D], the residual stream that enters the lowest of the blocks at hand; None: they are all at hand.
        part: int [B, T], 0 in prompts, and the number of its response where several responses of an example follow one prompt; they do not
            see each other. None: every example has one.
    """

    tokens: Any
    position: Any
    segment: Any
    column: Any
    target: Any
    weight: Any
    trunk: int = field(default=0, metadata={"static": True})
    branch: int = field(default=0, metadata={"static": True})
    h: Any = None
    part: Any = None


def batch_layout(batch: Batch) -> Layout:
    """How the tokens of a batch see each other: the trunk, and earlier ones of their own example."""
    rows, length = batch.tokens.shape
    segment = batch.segment[:, batch.trunk :].reshape(rows, -1, batch.branch)
    own = (segment[..., :, None] == segment[..., None, :]) & np.tri(batch.branch, dtype=bool)[None, None]
    if batch.part is not None:
        part = batch.part[:, batch.trunk :].reshape(rows, -1, batch.branch)
        own &= (part[..., None, :] == 0) | (part[..., :, None] == part[..., None, :])
    above = (segment > 0)[..., None] & np.ones((1, 1, 1, batch.trunk), bool)
    visible = jax.numpy.concatenate([above, own], axis=-1)
    return Layout(batch.position, visible, TokenIndex(batch.position, length), batch.trunk, batch.branch)


@dataclass(frozen=True)
class Shape:
    """Sizes that all batches of a run share, so that one program serves them.

    Attributes:
        rows: one per device that rows are split over.
        trunk: tokens that all examples begin with.
        branches, branch: how many there are in a row, and the tokens of each.
        scored: scored tokens per row.
    """

    rows: int
    trunk: int
    branches: int
    branch: int
    scored: int

    @property
    def length(self) -> int:
        return self.trunk + self.branches * self.branch


def epochs(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """Example numbers of every optimiser step, longest first.

    An epoch has every example once. Of the examples in the order of their lengths (equal ones by chance), each run of as many as the
    epoch has batches gives one to every batch, by chance too: all batches are about equally long, so that little is padded, and have
    equally many examples or one less, `batch` at most.
    """
    count = len(lengths)
    batches = -(-count // batch)
    table = np.full((-(-count // batches), batches), -1)
    chosen: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    while len(chosen) < steps:
        table.flat[:count] = np.lexsort((rng.random(count), -np.asarray(lengths)))
        table.flat[count:] = -1
        chosen += [column[column >= 0] for column in rng.permuted(table, axis=1).T]
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


def common_beginning(examples: Sequence[TokenizedExample]) -> int:
    """How many tokens all prompts begin with; at least the last token of every prompt is left to itself."""
    first, shared = examples[0].ids, max(0, min(example.prompt for example in examples) - 1)
    for example in examples[1:]:
        differs = np.nonzero(first[:shared] != example.ids[:shared])[0]
        shared = int(differs[0]) if len(differs) else shared
    return shared


def choose_shape(
    examples: Sequence[TokenizedExample], groups: Sequence[np.ndarray], packing: bool, devices: int, config: ModelConfig, trunk: int = 0
) -> Shape:
    """The shape that costs least over all groups of examples (one group is one forward pass).

    Args:
        packing: whether a branch may hold several examples.
        devices: one row each.
        config: decides what attention to one more token costs, relative to a token's matmuls of weights.
        trunk: tokens that all examples begin with.
    """
    longest = max(len(example.ids) for example in examples) - trunk
    per_key = ATTENTION_COST * 4 * config.heads * config.head_width / (2 * config.layer_weights)
    apart = max(1, longest // 64) * 8  # some thirty sizes, from one example in a branch to about four
    sizes = range(-(-longest // 8) * 8, 4 * longest + 8, apart) if packing else [bucket(longest)]
    shapes = [_fit(examples, groups, packing, Shape(devices, trunk, 0, size, 0)) for size in sizes]
    return min(shapes, key=lambda shape: shape.length * (1 + per_key * (shape.trunk + shape.branch)))


def _fit(examples: Sequence[TokenizedExample], groups: Sequence[np.ndarray], packing: bool, shape: Shape) -> Shape:
    """The shape with as many branches and scored tokens as its fullest row needs."""
    rows = [row for group in groups for row in _rows(examples, group, shape, packing)]
    scored = max(scored_tokens(examples, chain(*row)) for row in rows)
    return replace(shape, branches=max(len(row) for row in rows), scored=max(8, -(-scored // 8) * 8))


def _rows(examples: Sequence[TokenizedExample], group: np.ndarray, shape: Shape, packing: bool) -> list[list[list[int]]]:
    """Example numbers of every branch of every row."""
    lengths = [len(examples[i].ids) - shape.trunk for i in group]
    filled = fill_rows(lengths, shape.branch) if packing else [[i] for i in range(len(group))]
    branches = [[int(group[i]) for i in held] for held in filled]
    return [branches[row :: shape.rows] for row in range(shape.rows)]


@dataclass(frozen=True)
class Place:
    """Where an example lies in a batch.

    Attributes:
        example: its number.
        row: of the batch.
        begin: its first column behind the trunk.
        number: within its branch, from one.
        scored: where its response tokens stand among the row's scored ones.
    """

    example: int
    row: int
    begin: int
    number: int
    scored: slice


def places(examples: Sequence[TokenizedExample], group: np.ndarray, shape: Shape, packing: bool) -> Iterator[Place]:
    """Where `make_batch` puts every example of a group."""
    for row, branches in enumerate(_rows(examples, group, shape, packing)):
        filled = 0
        for at, held in enumerate(branches):
            begin = shape.trunk + at * shape.branch
            for number, index in enumerate(held, 1):
                example = examples[index]
                stop = filled + len(example.ids) - example.prompt
                yield Place(index, row, begin, number, slice(filled, stop))
                begin, filled = begin + len(example.ids) - shape.trunk, stop


def make_batch(examples: Sequence[TokenizedExample], group: np.ndarray, shape: Shape, packing: bool) -> Batch:
    """The examples of `group` as rows."""
    size, scored, trunk = (shape.rows, shape.length), (shape.rows, shape.scored), shape.trunk
    tokens, position, segment, part = (np.zeros(size, np.int32) for _ in range(4))
    column, target, weight = np.zeros(scored, np.int32), np.zeros(scored, np.int32), np.zeros(scored, np.float32)
    tokens[:, :trunk], position[:, :trunk] = examples[0].ids[:trunk], np.arange(trunk)
    for place in places(examples, group, shape, packing):
        example, row, there = examples[place.example], place.row, place.scored
        own, (at, parts, before) = example.ids[trunk:], laid_out(example)
        here = slice(place.begin, place.begin + len(own))
        tokens[row, here], position[row, here] = own, at[trunk:]
        segment[row, here], part[row, here] = place.number, parts[trunk:]
        column[row, there], target[row, there], weight[row, there] = place.begin - trunk + before, example.ids[example.prompt :], 1
    several = any(isinstance(example, Answered) for example in examples)
    return Batch(tokens, position, segment, column, target, weight, trunk, shape.branch, part=part if several else None)


def microbatches(group: np.ndarray, count: int) -> list[np.ndarray]:
    """A step's examples in `count` parts of as equal sizes as can be, and of as equal lengths where the longest come first."""
    return [group[part::count] for part in range(count)]


def stack(batches: Sequence[Batch]) -> Batch:
    """Several batches of one shape with a leading axis."""
    return jax.tree.map(lambda *parts: np.stack(parts), *batches)


def scored_tokens(examples: Sequence[TokenizedExample], group: Iterable[int]) -> int:
    """Response tokens of a group."""
    return sum(len(examples[i].ids) - examples[i].prompt for i in group)


def count_steps(count: int, batch: int, epoch_count: float) -> int:
    """Optimiser steps of `epoch_count` epochs."""
    return max(1, math.ceil(epoch_count * -(-count // batch) - 1e-9))
