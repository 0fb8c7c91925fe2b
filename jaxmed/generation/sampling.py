"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.params import Params
from jaxmed.models.transformer import as_logits, final_norm, head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        keys: random keys [B], one per row, so that a row's text does not depend on its batch.
        temperature, top_p: float.
        greedy: whether the most likely token is taken; the others do not count then.
    """

    keys: Any
    temperature: Any
    top_p: Any
    greedy: bool = field(metadata={"static": True})


def choose(config: ModelConfig, params: Params, h: jax.Array, step: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token int [B] after residual streams float32 [B,D]; -1 where the logits are not finite."""
    logits = _logits(config, params, h)
    known = jnp.isfinite(logits.max(axis=-1))  # of a NaN and others the maximum is NaN
    if sampling.greedy:
        return jnp.where(known, jnp.argmax(logits, axis=-1), -1).astype(jnp.int32)
    logits = _nucleus(logits / sampling.temperature, sampling.top_p)
    draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)  # noqa: E731
    return jnp.where(known, jax.vmap(draw)(sampling.keys, logits), -1).astype(jnp.int32)


def _logits(config: ModelConfig, params: Params, h: jax.Array) -> jax.Array:
    """Logits float32 [B,V]. The unembedding comes first: for few rows, Eigen takes up to eight times as long the other way round."""
    products = contract("VD,UD->VU", head(params), final_norm(config, params, h))
    return as_logits(config, jax.lax.optimization_barrier(products).T)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B,V] of the fewest tokens whose probabilities reach `top_p`; the others are minus infinity (Holtzman et al. 2020)."""
    order = jnp.argsort(-logits, axis=-1)
    share = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), axis=-1)
    kept = jnp.cumsum(share, axis=-1) - share < top_p
    mask = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    return jnp.where(mask, logits, -jnp.inf)
