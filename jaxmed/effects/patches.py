"""What is written in the place of a unit's base value. A new patch is one row of `PATCHES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jaxmed.effects.contrast import Contrast
from jaxmed.effects.mediators import Record

Means = Record
"""Site -> mean activations [L, ...]."""


@dataclass(frozen=True)
class PatchKind:
    """A way to patch.

    Attributes:
        values: (the source run's record [L, W, ...], means) -> what is written, [L, W, ...].
        told: what it is, in words of the legend.
        means: whether it needs them.
    """

    values: Callable[[Record, Means], Record]
    told: str
    means: bool = False


def _source(record: Record, means: Means) -> Record:
    del means
    return record


def _zero(record: Record, means: Means) -> Record:
    del means
    return {site: jnp.zeros_like(values) for site, values in record.items()}


def _mean(record: Record, means: Means) -> Record:
    return {site: jnp.broadcast_to(means[site][:, None], values.shape).astype(values.dtype) for site, values in record.items()}


PATCHES: dict[str, PatchKind] = {
    "resample": PatchKind(_source, "the source run's value"),
    "zero": PatchKind(_zero, "zero"),
    "mean": PatchKind(_mean, "the mean over the source runs of all pairs, at their patched tokens", means=True),
}


def mean_records(contrasts: Sequence[Contrast], records: Callable[[Contrast], Record]) -> Means:
    """The mean over contrasts, and over the patched tokens of each, of what their source runs hold: every contrast weighs the same.

    Args:
        records: a contrast's source record [L, P, ...] at its patched tokens.
    """
    total: Record = {}
    for contrast in contrasts:
        for site, values in records(contrast).items():
            own = jnp.asarray(values, jnp.float32).mean(axis=1)
            total[site] = total[site] + own if site in total else own
    return {site: values / len(contrasts) for site, values in total.items()}
