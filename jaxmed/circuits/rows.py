"""Pairs as rows for circuits: both prompts with their answers, the window of tokens from the first that differs, and what outcomes read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmed.axes import vocabulary_parts
from jaxmed.effects.contrast import Contrast
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.readout import READ_BUCKETS, Readout, Reads, make_reads, read_columns
from jaxmed.errors import UserError
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.tokens import WINDOW_BUCKETS, bucket


@dataclass(frozen=True, order=True)
class RowShape:
    """Sizes that pairs of one batch have in common: tokens of a row, of its window, columns whose logits are read, and answer tokens."""

    length: int
    window: int
    asked: int
    answers: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CircuitRows:
    """A pair; of a batch, every array has a leading axis `B`.

    Attributes:
        base, source: int [T], tokens of the two runs.
        position, visible: int [T], bool [T, T], of both.
        start: int, the window's first column: no token before it differs.
        reads: what outcomes read; slots count from the window's beginning.
    """

    base: Any
    source: Any
    position: Any
    visible: Any
    start: Any
    reads: Reads


def check_equal(contrast: Contrast) -> None:
    """Raises a UserError for a pair whose prompts have different numbers of tokens, the same tokens, or two models."""
    base, source = contrast.base, contrast.source
    if base.model is not source.model:
        raise UserError("Circuits compare two prompts in one model, and these pairs have two models. Leave the source model out.")
    if len(base.ids) != len(source.ids):
        raise UserError(
            f"pair {contrast.pair.id!r} has {len(base.ids)} tokens in base and {len(source.ids)} in source. A circuit's edges carry values "
            "token by token, so both need equally many: reword one, or leave the pair out."
        )
    if (base.ids == source.ids).all():
        raise UserError(f"pair {contrast.pair.id!r} has the same tokens in base and source, so there is nothing to find. Leave it out.")


def shape_of(contrast: Contrast) -> RowShape:
    """The sizes of a pair's programs."""
    packed, answers = contrast.packed(), contrast.answers.ids
    window = bucket(packed.used - _first(contrast), WINDOW_BUCKETS)
    asked = bucket(len(read_columns(packed)), READ_BUCKETS)
    return RowShape(len(packed.tokens), min(window, len(packed.tokens)), asked, bucket(max(sum(map(len, answers)), 1), READ_BUCKETS))


def _first(contrast: Contrast) -> int:
    """The first token that differs."""
    return int(np.flatnonzero(contrast.base.ids != contrast.source.ids)[0])


def pair_row(contrast: Contrast) -> CircuitRows:
    """One pair; the window ends at the last token that is used, where it is not longer than the row."""
    packed, source = contrast.packed(), contrast.packed(contrast.source)
    start = max(packed.used - shape_of(contrast).window, 0)
    reads = make_reads(packed, contrast.answers, start)
    return CircuitRows(packed.tokens, source.tokens, packed.position, packed.visible, np.int32(start), reads)


def batch_of(contrasts: Sequence[Contrast], count: int) -> CircuitRows:
    """Pairs of one shape side by side, the last one repeated until there are `count`."""
    rows = [pair_row(contrast) for contrast in contrasts]
    rows += [rows[-1]] * (count - len(rows))
    return jax.tree.map(lambda *values: np.stack(values), *rows)


def readout_of(model: Model, outcome: OutcomeName) -> Readout:
    """How an outcome is read of a model's last residual stream."""
    return Readout((outcome,), vocabulary_parts(model.mesh))


def outcomes_of(config: ModelConfig, params: Params, readout: Readout, h: jax.Array, reads: Reads) -> jax.Array:
    """The outcome float32 [B] of rows' last residual streams h [B,T,D] at their windows, each read in its own way."""

    def one(h: jax.Array, reads: Reads) -> jax.Array:
        return readout(config, params, h[reads.slots][None], reads)[0, 0]

    return jax.vmap(one, spmd_axis_name="data")(h, reads)
