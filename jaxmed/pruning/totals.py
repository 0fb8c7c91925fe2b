"""Sums over examples, updated matrix by matrix inside the reverse scan over layers; every device adds up its own examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.axes import split_axes
from jaxmed.batching.batches import Batch, batch_layout
from jaxmed.batching.losses import token_losses
from jaxmed.models.checkpoints.tensors import matrix_rules
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import FAMILIES
from jaxmed.models.params import MATRICES, Params, block_letters
from jaxmed.models.transformer import SCORED, embed
from jaxmed.runner import Recording, run


def total_letters(config: ModelConfig, kinds: Sequence[str]) -> Params:
    """Letters of a layer's totals, per matrix and kind."""
    found: Params = {}
    for name in sorted({rule.path[-1] for rule in matrix_rules(FAMILIES[config.family])}):
        letters = block_letters(config)[name]
        of = {"signed": letters, "absolute": letters, "inputs": letters[: MATRICES[name]]}
        found[name] = {kind: of[kind] for kind in kinds}
    return found


def fresh_totals(config: ModelConfig, kinds: Sequence[str], layers: int, devices: int) -> Params:
    """Zeros, float32 [devices, layers, ...] per matrix and kind; `devices`: of the mesh axis "data"."""
    zeros = lambda letters: jnp.zeros((devices, layers, *(config.sizes[letter] for letter in letters)), jnp.float32)  # noqa: E731
    return jax.tree.map(zeros, total_letters(config, kinds))


def total_shardings(config: ModelConfig, kinds: Sequence[str], mesh: jax.sharding.Mesh) -> Params:
    """Where the totals lie: each device on "data" has its own, split as the matrices are."""
    place = lambda letters: jax.NamedSharding(mesh, jax.P("data", None, *split_axes(letters, mesh)))  # noqa: E731
    return jax.tree.map(place, total_letters(config, kinds))


@partial(jax.jit, static_argnames=("config", "span", "remat", "mesh"))
def add_batch(
    config: ModelConfig, params: Params, totals: Params, batch: Batch, counted: jax.Array, span: tuple[int, int], remat: bool, mesh: Any
) -> tuple[Params, jax.Array]:
    """(totals with a batch added, sum of the examples' losses [devices]); `totals` [devices, layers, ...], the others [B, ...]."""

    def own(params: Params, totals: Params, batch: Batch, counted: jax.Array) -> tuple[Params, jax.Array]:
        mine = jax.tree.map(lambda leaf: leaf[0], totals)
        loss = partial(_summed_loss, config, params, batch=batch, counted=counted, span=span, remat=remat)
        value, new = jax.value_and_grad(loss)(mine)
        return jax.tree.map(lambda leaf: leaf[None], new), value[None]

    rows, whole = jax.P("data"), jax.P()
    return jax.shard_map(own, mesh=mesh, in_specs=(whole, rows, rows, rows), out_specs=(rows, rows), axis_names={"data"}, check_vma=False)(
        params, totals, batch, counted
    )


def _summed_loss(
    config: ModelConfig, params: Params, totals: Params, batch: Batch, counted: jax.Array, span: tuple[int, int], remat: bool
) -> jax.Array:
    """Sum over examples of their mean losses; the blocks of `span` add to `totals` on the way back."""
    layout, stream = batch_layout(batch), None
    for first, stop, scored in ((0, span[0], False), (*span, True), (span[1], config.layers, False)):
        if first == stop:
            continue
        blocks = params["blocks"]
        if (first, stop) != (0, config.layers):
            blocks = jax.tree.map(lambda leaf, first=first, stop=stop: leaf[first:stop], blocks)
        if scored:
            of_layers = jnp.broadcast_to(counted, (stop - first, *counted.shape))
            blocks = {**blocks, SCORED: {**totals, "counted": of_layers}}
        stream = embed(config, params, batch.tokens, layout.position) if stream is None else stream
        stream = run(config, {**params, "blocks": blocks}, stream, layout, Recording(remat=remat), first=first).stream
    assert stream is not None
    return (token_losses(config, params, stream, batch) * batch.weight).sum()
