"""Pairs that go through the model side by side: their tokens, windows, patched tokens and reads, padded to buckets.

A window is the tokens of a base prompt from the first patched one to the last token of its answers: gradients are needed there alone,
since later tokens cannot change earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxmed.effects.contrast import Contrast
from jaxmed.effects.readout import READ_BUCKETS, Reads, make_reads, read_columns
from jaxmed.tokens import WINDOW_BUCKETS, PackedPrompt, bucket

PAIRS = "pairs"
"""The group of rows that are pairs."""


@dataclass(frozen=True, order=True)
class BatchShape:
    """The sizes of a batch's programs, the number of pairs apart.

    Attributes:
        length, source_length: tokens of the base and of the source row, answers included.
        window: tokens that gradients are taken at.
        asked, answers: columns whose logits are read, and answer tokens.
        patches, tokens: effects per unit, and the most tokens of one.
    """

    length: int
    source_length: int
    window: int
    asked: int
    answers: int
    patches: int
    tokens: int

    @property
    def key(self) -> str:
        """The key of `Job.chunk`."""
        sizes = (self.source_length, self.window, self.asked, self.answers, self.patches, self.tokens)
        return f"{PAIRS}@{self.length}x{'x'.join(map(str, sizes))}"


def shape_of(contrast: Contrast) -> BatchShape:
    """The sizes of a contrast's programs; those of pairs in one batch are equal."""
    packed, source, patches = contrast.packed(), contrast.packed(contrast.source), contrast.patches
    return BatchShape(
        len(packed.tokens),
        len(source.tokens),
        window_of(contrast)[1],
        bucket(len(read_columns(packed)), READ_BUCKETS),
        bucket(max(sum(map(len, contrast.answers.ids)), 1), READ_BUCKETS),
        bucket(len(patches), WINDOW_BUCKETS) if len(patches) > 1 else 1,
        bucket(max(len(patch.base) for patch in patches), WINDOW_BUCKETS),
    )


def batches_of(contrasts: Sequence[Contrast], sizes: dict[str, int]) -> list[tuple[int, ...]]:
    """Numbers of the contrasts of every batch: equal shapes together, in order, as many as `sizes` says of a shape's key."""
    by_shape: dict[BatchShape, list[int]] = {}
    for number, contrast in enumerate(contrasts):
        by_shape.setdefault(shape_of(contrast), []).append(number)
    cut = ((numbers, max(1, sizes[shape.key])) for shape, numbers in by_shape.items())
    return sorted(tuple(numbers[at : at + size]) for numbers, size in cut for at in range(0, len(numbers), size))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Row:
    """A prompt with its answers, as `run_tokens` takes it.

    Attributes:
        tokens, position: int [T].
        visible: bool [T, T].
        columns: int [W], of the window; of a source row, those that go with base's (0 where nothing is patched).
        reads: what outcomes read; slots of a base row count from the window's beginning, of a source row from the row's.
    """

    tokens: Any
    position: Any
    visible: Any
    columns: Any
    reads: Reads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairRows:
    """A pair; of a batch, every array has a leading axis `B`.

    Attributes:
        base, source: the two runs.
        start: int, the window's first column.
        visible: bool [W, W], how the window's tokens see each other.
        slots: int [P, C], the window's tokens that are patched together, of every patch.
        patched: bool [P, C], which of these count.
    """

    base: Row
    source: Row
    start: Any
    visible: Any
    slots: Any
    patched: Any


def pair_rows(contrast: Contrast, shape: BatchShape) -> PairRows:
    """A contrast as rows of the shape's sizes."""
    packed, source, start = contrast.packed(), contrast.packed(contrast.source), window_of(contrast)[0]
    offset = start + np.arange(shape.window, dtype=np.int32)
    columns, used = np.minimum(offset, len(packed.tokens) - 1), offset < packed.used
    visible = packed.visible[np.ix_(columns, columns)] & used & used[:, None] | np.eye(shape.window, dtype=bool)
    from_base = {b: s for patch in contrast.patches for b, s in zip(patch.base, patch.source, strict=True)}
    aligned = np.asarray([from_base.get(int(column), 0) for column in offset], np.int32)
    slots, patched = np.zeros((shape.patches, shape.tokens), np.int32), np.zeros((shape.patches, shape.tokens), bool)
    for number, patch in enumerate(contrast.patches):
        slots[number, : len(patch.base)] = np.asarray(patch.base) - start
        patched[number, : len(patch.base)] = True
    base = _row(packed, columns, make_reads(packed, contrast.answers, start))
    there = _row(source, aligned, make_reads(source, contrast.answers, 0))
    return PairRows(base, there, np.int32(start), visible, slots, patched)


def batch_rows(contrasts: Sequence[Contrast], count: int) -> PairRows:
    """Contrasts of one shape side by side, the last one repeated until there are `count`."""
    rows = [pair_rows(contrast, shape_of(contrast)) for contrast in contrasts]
    rows += [rows[-1]] * (count - len(rows))
    return jax.tree.map(lambda *values: np.stack(values), *rows)


def with_target(pairs: PairRows, target: jax.Array) -> PairRows:
    """The pairs, whose base runs are compared with the source's next-token log-probabilities float32 [B,V]."""
    return replace(pairs, base=replace(pairs.base, reads=replace(pairs.base.reads, source=target)))


def _row(packed: PackedPrompt, columns: np.ndarray, reads: Reads) -> Row:
    return Row(packed.tokens, packed.position, packed.visible, columns, reads)


def window_of(contrast: Contrast) -> tuple[int, int]:
    """First column and size of a window. One that would be as long as the row is the row: it then needs no earlier keys and values."""
    packed, start = contrast.packed(), min(patch.base[0] for patch in contrast.patches)
    size = bucket(packed.used - start, WINDOW_BUCKETS)
    return (start, size) if size < len(packed.tokens) else (0, len(packed.tokens))
