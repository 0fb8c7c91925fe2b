"""What a patch has to know of all pairs: means and spreads of their runs at the patched tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.effects.contrast import Contrast
from jaxmed.effects.engine import source_values
from jaxmed.effects.rows import Record
from jaxmed.interventions.sites import STREAM
from jaxmed.models.config import ModelConfig
from jaxmed.models.params import Params


@dataclass(frozen=True)
class Reference:
    """What the runs of all pairs hold at their patched tokens; every pair weighs the same, and within it every token.

    Attributes:
        means: side ("source", "base") -> site -> mean [L, ...].
        spread: site -> standard deviation of all values of a layer in the source runs, whatever token and unit: [L]. At sites of the
            residual stream it is the token embeddings' standard deviation, in every layer (Meng et al. 2022, arXiv 2202.05262).
    """

    means: dict[str, Record]
    spread: Record

    def change(self, site: str) -> jax.Array:
        """Mean of source minus mean of base: [L, ...]."""
        return self.means["source"][site] - self.means["base"][site]


def make_reference(needs: Sequence[str], contrasts: Sequence[Contrast], units: tuple[str, ...]) -> Reference | None:
    """The reference at the sites of these kinds of units, from full forwards of the sides that are needed; None where none is."""
    totals: dict[str, Any] = {}
    for contrast in contrasts:
        sides = {"source": contrast, "base": contrast.turned()}
        for side in needs:
            own = _moments(source_values(sides[side], units))
            totals[side] = jax.tree.map(jnp.add, totals[side], own) if side in totals else own
    if not totals:
        return None
    found = jax.tree.map(lambda total: total / len(contrasts), totals)
    means = {side: {site: mean for site, (mean, *_) in sites.items()} for side, sites in found.items()}
    spread = {site: jnp.sqrt(jnp.maximum(square - value * value, 0.0)) for site, (_, value, square) in found["source"].items()}
    model = contrasts[0].base.model
    embedded = {site: jnp.full_like(spread[site], _embedding_spread(model.config, model.params)) for site in STREAM if site in spread}
    return Reference(means, {**spread, **embedded})


@jax.jit
def _moments(record: Record) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Site -> mean over tokens [L, ...], mean over all values of a layer [L], and of their squares [L]."""
    wide = {site: values.astype(jnp.float32) for site, values in record.items()}
    flat = {site: values.reshape(len(values), -1) for site, values in wide.items()}
    return {site: (wide[site].mean(1), flat[site].mean(1), (flat[site] * flat[site]).mean(1)) for site in wide}


@partial(jax.jit, static_argnames=("config",))
def _embedding_spread(config: ModelConfig, params: Params) -> jax.Array:
    """The standard deviation of all numbers of the token embeddings, as they enter the residual stream."""
    return jnp.std(params["embedding"].astype(jnp.float32)) * abs(config.embedding_scale)
