"""Outcomes of both runs of many contrasts, side by side: nothing is patched and nothing is kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmed.axes import row_parts, row_sharding, vocabulary_parts
from jaxmed.effects.contrast import Contrast
from jaxmed.effects.first_order import read_rows
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.pair_batches import Row
from jaxmed.effects.readout import Readout, make_reads
from jaxmed.hosts import to_host
from jaxmed.models.model import Model
from jaxmed.runs.cost import TOKENS_PER_DEVICE


def run_ends(contrasts: Sequence[Contrast], outcomes: tuple[OutcomeName, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of the base runs and of the source runs, float32 [O, P] each: what `prepare` finds pair by pair, batch by batch.

    Args:
        contrasts: of one model, and one source model.
    """
    there, targets = _side(contrasts, "source", outcomes, None)
    return _side(contrasts, "base", outcomes, targets)[0], there


def _side(
    contrasts: Sequence[Contrast], side: str, outcomes: tuple[OutcomeName, ...], targets: list[Any] | None
) -> tuple[np.ndarray, list[Any]]:
    """Outcomes [O, P], and what outcomes that compare next tokens need of each run: log-probabilities [V], else [0]."""
    model: Model = getattr(contrasts[0], side).model
    devices, platform = row_parts(model.mesh), model.mesh.devices.flat[0].platform
    rows = [_row(one, side, targets[number] if targets else None) for number, one in enumerate(contrasts)]
    by_shape: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        by_shape.setdefault(tuple(np.shape(leaf) for leaf in jax.tree.leaves(row)), []).append(number)
    found, read = np.zeros((len(outcomes), len(rows)), np.float32), Readout(outcomes, vocabulary_parts(model.mesh))
    kept: dict[int, Any] = {}
    for numbers in by_shape.values():
        most = max(1, TOKENS_PER_DEVICE.get(platform, 2048) // len(rows[numbers[0]].tokens)) * devices
        size = -(-len(numbers) // (-(-len(numbers) // most)))  # batches of one size
        size = -(-size // devices) * devices
        for at in range(0, len(numbers), size):
            here = numbers[at : at + size]
            batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(rows[number] for number in _filled(here, size)))
            placed = jax.device_put(batch, row_sharding(model.mesh))
            values, next_tokens = map(to_host, _read(model.config, model.params, placed, read))
            found[:, here] = values[:, : len(here)]
            kept |= dict(zip(here, next_tokens, strict=False))
    return found, [kept[number] for number in range(len(rows))]


_read = partial(jax.jit, static_argnames=("config", "readout"))(read_rows)


def _filled(numbers: list[int], size: int) -> list[int]:
    return numbers + numbers[-1:] * (size - len(numbers))


def _row(contrast: Contrast, side: str, target: Any) -> Row:
    packed = contrast.packed(getattr(contrast, side))
    return Row(packed.tokens, packed.position, packed.visible, np.zeros(1, np.int32), make_reads(packed, contrast.answers, 0, target))
