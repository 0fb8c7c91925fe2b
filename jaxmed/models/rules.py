"""What gradients flow through. The value of a block is the same under every rule; only its linearisation differs.

A new rule set is one row of `RULES`. Rules are made of `stop_gradient` and arithmetic, so that forward-mode, reverse-mode and `vmap`
work with all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

stop = jax.lax.stop_gradient


@dataclass(frozen=True)
class Rules:
    """How a block is linearised.

    Attributes:
        norm: the reciprocal scale of a norm [..., 1] as gradients see it.
        active: (gate's input, its activation), both [..., M] -> the activation as gradients see it.
        product: (activation, up branch), both [..., M] -> their product as gradients see it.
        pattern: the attention pattern as gradients see it.
    """

    norm: Callable[[jax.Array], jax.Array]
    active: Callable[[jax.Array, jax.Array], jax.Array]
    product: Callable[[jax.Array, jax.Array], jax.Array]
    pattern: Callable[[jax.Array], jax.Array]


def _same(x: jax.Array) -> jax.Array:
    return x


def _plain_activation(gate: jax.Array, active: jax.Array) -> jax.Array:
    del gate
    return active


def _plain_product(active: jax.Array, up: jax.Array) -> jax.Array:
    return active * up


def _secant(gate: jax.Array, active: jax.Array) -> jax.Array:
    """The activation as a multiple of its input: slope act(x) / x instead of the derivative; the derivative's limit at 0 is 0.5 for
    SiLU and GELU, and the activation itself is 0 there."""
    slope = jnp.where(gate == 0, 0.0, active / jnp.where(gate == 0, 1.0, gate))
    return stop(active) + (gate - stop(gate)) * stop(slope)


def _half(active: jax.Array, up: jax.Array) -> jax.Array:
    """Each factor gets half of the product's gradient, so that relevance is conserved."""
    return 0.5 * active * stop(up) + 0.5 * stop(active) * up


EXACT = Rules(_same, _plain_activation, _plain_product, _same)
"""The derivative."""
RELP = Rules(stop, _secant, _half, stop)
"""Layer-wise relevance propagation: norms and patterns are constants, activations secants, products halved (Jafari et al. 2025)."""
RULES = {"exact": EXACT, "relp": RELP}
