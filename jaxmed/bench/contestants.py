"""The JAX contestants: the engine, the bare matmuls of its shapes, and naive full-forward patching."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_parts, row_sharding
from jaxmed.bench.shapes import Subject
from jaxmed.effects.engine import chunk_rows, unit_values
from jaxmed.interventions.edits import ANY, Edit, Where
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.params import Params
from jaxmed.models.transformer import as_logits, final_norm, head
from jaxmed.runner import causal_layout, forward, run_tokens


def engine(subject: Subject, layers: list[int]) -> np.ndarray:
    """Exact effects float32 [layer, neuron] of all neurons of these layers, dispatched as a sweep does."""
    count = subject.model.config.neurons
    started = [
        unit_values(subject.model, subject.window, [("neuron", layer, i) for i in range(count)], 1, subject.per_device, subject.readout)
        for layer in layers
    ]
    return np.stack([values.effects(count)[0][0] for values in started])


@partial(jax.jit, static_argnames=("config",))
def _matmuls(config: ModelConfig, params: Params, x: jax.Array, first: Any, tokens: jax.Array) -> jax.Array:
    """The weight matmuls of layers `first` to the last on rows x [U,D], chained, and the answer rows of the head; nothing else."""
    blocks, dtype = params["blocks"], config.compute
    wide = config.heads * config.head_width

    def step(layer: jax.Array, x: jax.Array) -> jax.Array:
        qkv, out, gate_up, down = (
            jax.lax.dynamic_index_in_dim(blocks[name], layer, 0, keepdims=False) for name in ("qkv", "out", "gate_up", "down")
        )
        y = contract("UD,DF->UF", x, qkv.reshape(config.width, -1), dtype=dtype)
        y = contract("UF,FD->UD", y[:, :wide], out.reshape(wide, -1), dtype=dtype)
        y = contract("UD,DF->UF", y, gate_up.reshape(config.width, -1), dtype=dtype)
        return contract("UF,FD->UD", y[:, : config.neurons], down, dtype=dtype)

    x = jax.lax.fori_loop(first, config.layers, step, x)
    return contract("UD,RD->UR", x, head(params)[tokens])


def bare_matmuls(subject: Subject, layers: list[int]) -> list[jax.Array]:
    """Runs the bare matmuls with the engine's rows, layers and chunks."""
    model = subject.model
    chunks = chunk_rows(model.config.neurons, subject.per_device, row_parts(model.mesh))
    spec = row_sharding(model.mesh)
    rows = jax.device_put(jnp.full((chunks[0].size, model.config.width), 0.01, model.config.compute), spec)
    tokens = subject.window.reads.token
    return [_matmuls(model.config, model.params, rows, np.int32(layer + 1), tokens) for layer in layers for _ in chunks]


@partial(jax.jit, static_argnames=("config",))
def _patched_logits(config: ModelConfig, params: Params, tokens: jax.Array, layer: Any, neurons: jax.Array, values: jax.Array) -> jax.Array:
    """Logits [U,V] at the last token of full forwards, one per neuron: vmap over edits."""
    layout = causal_layout(1, tokens.shape[0])

    def one(neuron: jax.Array, value: jax.Array) -> jax.Array:
        entries = Where(layer[None], jnp.asarray([-1]), neuron[None], jnp.asarray([ANY]))
        edit = Edit(jnp.ones(1), value[None], jnp.zeros(1), None, entries)
        h = run_tokens(config, params, tokens[None], layout, edits={"neuron": edit}).stream
        return h[0, -1]

    h = jax.vmap(one)(neurons, values)
    return as_logits(config, contract("UD,VD->UV", final_norm(config, params, h), head(params)))


def naive(subject: Subject, layer: int, count: int, batch: int = 32) -> np.ndarray:
    """Effects [count] of a layer's first neurons by vmapped full-forward patching in JAX, `batch` at a time."""
    model, answers = subject.model, subject.answers
    config = model.config
    source = forward(config, model.params, subject.source[None], causal_layout(1, len(subject.source)), None, ("neuron",))[1]
    values = source["neuron"][layer, 0, -1].astype(jnp.float32)
    base = forward(config, model.params, subject.base[None], causal_layout(1, len(subject.base)))[0][:, -1]
    ids, weights = jnp.asarray([answer[0] for answer in answers.ids]), jnp.asarray(answers.weights[0])

    def odds(logits: jax.Array) -> jax.Array:
        picked = logits[:, ids]
        total = lambda side: jax.nn.logsumexp(jnp.where(side, picked, -jnp.inf), axis=-1)  # noqa: E731
        return total(weights > 0) - total(weights < 0)

    found = []
    for begin in range(0, count, batch):
        neurons = jnp.arange(begin, begin + batch)
        found.append(odds(_patched_logits(config, model.params, jnp.asarray(subject.base), jnp.asarray(layer), neurons, values[neurons])))
    return np.asarray(jnp.concatenate(found) - odds(base))[:count]
