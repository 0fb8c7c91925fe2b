"""Derivatives of every order and mode through a whole model, and rules that change them without changing a value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.interventions.edits import Edit
from jaxmed.models.model import Model
from jaxmed.models.rules import EXACT, RELP, RULES, Rules
from jaxmed.runner import Recording, causal_layout, logits_of, run_tokens
from tests import tiny

LENGTH = 5
KINDS = ["llama", pytest.param("post_norm", marks=pytest.mark.slow), pytest.param("windowed_biased", marks=pytest.mark.slow)]


def _outcome(model: Model, gates: jax.Array, rules: Rules = EXACT, remat: bool = False) -> jax.Array:
    """A logit difference as a function of one gate per neuron [L,1,1,F], each towards zero at every token."""
    edits = {"neuron": Edit(gates, jnp.float32(0.0))}
    tokens = jnp.arange(3, 3 + LENGTH)[None]
    ran = run_tokens(model.config, model.params, tokens, causal_layout(1, LENGTH), Recording(rules=rules, remat=remat), edits=edits)
    logits = logits_of(model.config, model.params, ran.stream[:, -1])[0]
    return logits[7] - logits[11]


def _gates(model: Model, seed: int = 0, scale: float = 1.0) -> jax.Array:
    shape = (model.config.layers, 1, 1, model.config.neurons)
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_reverse_mode_agree(kind: str) -> None:
    model = tiny.model(kind)
    zero, direction = _gates(model, scale=0.0), _gates(model, 1)
    forward = jax.jvp(lambda g: _outcome(model, g), (zero,), (direction,))[1]
    linear = jax.linearize(lambda g: _outcome(model, g), zero)[1](direction)
    gradient = jax.grad(lambda g: _outcome(model, g))(zero)
    assert float(forward) == pytest.approx(float(jnp.vdot(gradient, direction)), rel=1e-4)
    assert float(linear) == pytest.approx(float(forward), rel=1e-5)
    steps = 1e-2
    measured = (_outcome(model, steps * direction) - _outcome(model, -steps * direction)) / (2 * steps)
    assert float(forward) == pytest.approx(float(measured), rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_vector_products_are_symmetric_and_true(kind: str) -> None:
    model = tiny.model(kind)
    zero, u, v = _gates(model, scale=0.0), _gates(model, 1), _gates(model, 2)
    gradient = jax.grad(lambda g: _outcome(model, g))

    def product(at: jax.Array) -> jax.Array:
        return jax.jvp(gradient, (zero,), (at,))[1]

    assert float(jnp.vdot(u, product(v))) == pytest.approx(float(jnp.vdot(v, product(u))), rel=1e-3)
    measured = (gradient(1e-2 * v) - gradient(-1e-2 * v)) / 2e-2
    assert float(jnp.vdot(u, measured)) == pytest.approx(float(jnp.vdot(u, product(v))), rel=5e-2)
    both = jax.vmap(product)(jnp.stack([u, v]))
    assert np.allclose(both[1], product(v), atol=1e-4)


def test_recomputed_blocks_have_the_same_gradient(plain_model: Model) -> None:
    gates = _gates(plain_model, 3, 0.1)
    kept, again = (jax.grad(lambda g, remat=remat: _outcome(plain_model, g, remat=remat))(gates) for remat in (False, True))
    assert np.allclose(kept, again, atol=1e-5)
    assert float(jnp.abs(kept).max()) > 1e-2


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_rules_change_no_value(kind: str, name: str) -> None:
    model = tiny.model(kind)
    gates = _gates(model, 4, 0.1)
    assert float(_outcome(model, gates, RULES[name])) == pytest.approx(float(_outcome(model, gates)), abs=1e-5)


def test_relevance_is_conserved_by_the_mlp(plain_model: Model) -> None:
    """With norms, patterns and slopes held constant the model is linear in its embedding: gradient times input is the logit itself."""
    config, params = plain_model.config, plain_model.params
    tokens, layout = jnp.arange(3, 3 + LENGTH)[None], causal_layout(1, LENGTH)

    def logit(scale: jax.Array, rules: Rules) -> jax.Array:
        scaled = {**params, "embedding": params["embedding"] * scale}
        ran = run_tokens(config, scaled, tokens, layout, Recording(rules=rules))
        return jnp.vdot(ran.stream[0, -1], jnp.arange(config.width) / config.width)

    value, slope = jax.value_and_grad(logit)(jnp.float32(1.0), RELP)
    assert float(slope) == pytest.approx(float(value), rel=1e-4)
    assert abs(float(jax.grad(logit)(jnp.float32(1.0), EXACT)) - float(value)) > 1e-2
