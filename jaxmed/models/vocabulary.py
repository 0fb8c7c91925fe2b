"""Reductions over the vocabulary, in an order that the device at hand is fast at."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

LANES = 128


def _lanes(logits: jax.Array) -> jax.Array:
    """[..., V] as [..., V / LANES, LANES] on the CPU, whose XLA backend reduces a row number by number, but rows under each other many
    numbers at a time; else, and where the vocabulary does not divide, [..., V, 1]."""
    lanes = 1 if jax.default_backend() != "cpu" or logits.shape[-1] % LANES else LANES
    return logits.reshape(*logits.shape[:-1], -1, lanes)


def largest(logits: jax.Array) -> jax.Array:
    """The largest over the last axis."""
    return _lanes(logits).max(-2).max(-1)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


@jax.custom_jvp
def log_total(logits: jax.Array) -> jax.Array:
    """log of the sum of the exponentials over the last axis."""
    lanes = _lanes(logits)
    most = lanes.max(-2)
    top = _finite(most.max(-1))
    totals = jnp.exp(lanes - _finite(most)[..., None, :]).sum(-2)
    return top + jnp.log((totals * jnp.exp(most - top[..., None])).sum(-1))


@log_total.defjvp
def _log_total_change(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    found = log_total(primals[0])
    return found, (jnp.exp(primals[0] - found[..., None]) * tangents[0]).sum(-1)
