"""Prompts through the model, shard by shard and within a shard in batches of like length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.cache.job import Job
from jaxmed.errors import NOT_FINITE, notice
from jaxmed.runner.public import forward
from jaxmed.tokens import bucket, pad

AT_ONCE = 1 << 28
"""Bytes of activations that one batch may leave on the device, unless one prompt alone leaves more."""
ROWS = 32


def open_shards(count: int, shard: int, done: np.ndarray) -> list[range]:
    """Numbers of the prompts of every shard of which a prompt is not done."""
    shards = [range(begin, min(begin + shard, count)) for begin in range(0, count, shard)]
    return [chosen for chosen in shards if not done[chosen].all()]


def run_shards(job: Job, shards: Iterable[range | None]) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
    """(numbers of prompts, site -> float32 [prompt, L, position, ...]) of every shard; of None, no prompts."""
    for chosen in shards:
        yield (range(0), {}) if chosen is None else (chosen, _run_shard(job, chosen))


def _run_shard(job: Job, prompts: range) -> dict[str, np.ndarray]:
    layouts = job.table.arrays
    found = {name: np.full((len(prompts), *layouts[name].shape[1:]), np.nan, np.float32) for name in job.axes}
    per_token = 4 * job.model.config.layers * sum(math.prod(layout.shape[3:]) for layout in layouts.values())
    for rows, length in _batches(np.asarray([len(job.rows[number]) for number in prompts]), per_token):
        numbers = [prompts[row] for row in rows]
        ids, padding = pad([job.rows[number] for number in numbers], length)
        taps = forward(job.model, ids, taps=tuple(job.axes), padding=padding, logits="none")[1]
        for name, letters in job.axes.items():
            out = np.full((len(rows), *found[name].shape[1:]), np.nan, np.float32)
            if not _fill(out, taps[name], letters, (job.table.coordinates["position"], job.columns[numbers]), padding):
                notice(f"Activations at {name} are not all finite. {NOT_FINITE}")
            found[name][rows] = out
    return found


def _batches(lengths: np.ndarray, per_token: int) -> Iterator[tuple[list[int], int]]:
    """(rows, columns): rows of one bucket of lengths. The last batch repeats its last row up to a power of two, so that shapes are few."""
    buckets = np.asarray([bucket(int(length)) for length in lengths])
    for size in np.unique(buckets):
        numbers = np.flatnonzero(buckets == size).tolist()
        most = max(1, min(ROWS, AT_ONCE // max(1, per_token * int(size))))
        for begin in range(0, len(numbers), most):
            chosen = numbers[begin : begin + most]
            count = min(most, 1 << (len(chosen) - 1).bit_length())
            yield [*chosen, *[chosen[-1]] * (count - len(chosen))], int(size)


def _fill(out: np.ndarray, tap: jax.Array, axes: str, places: tuple[np.ndarray, np.ndarray], padding: np.ndarray) -> bool:
    """Puts activations [L, B, ...] of a batch, padded at the left, into `out` [B, L, position, ...], which holds NaN.

    Returns:
        Whether all of them are finite.

    Args:
        places: the coordinate `position`, and int [B, position]: columns counted from the right, 0 where a prompt has none.
    """
    at = axes.index("T") + 1
    width = tap.shape[at]
    inside = places[0] >= -width
    wanted = places[1][:, inside]
    values = np.moveaxis(np.asarray(jax.vmap(partial(jnp.take, axis=at - 1), (1, 0))(tap, wanted % width), np.float32), at, 2)
    missing = (wanted == 0).reshape(len(wanted), 1, -1, *[1] * (values.ndim - 3))
    if "S" in axes:
        missing = missing | (np.arange(width) < padding[:, None])[:, None, None, None]
        keys = min(width, out.shape[-1])
        out[:, :, inside, ..., -keys:] = np.where(missing, np.nan, values)[..., -keys:]
    else:
        out[:, :, inside] = np.where(missing, np.nan, values)
    return bool((np.isfinite(values) | missing).all())
