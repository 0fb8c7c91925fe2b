"""Units: what can be patched, and the residual stream that each patch leaves at its layer.

A new granularity is one row of `UNITS` and its branch-free vector in `module_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract, normalise
from jaxmed.models.transformer import Params, matrix_rows, open_block
from jaxmed.runner import Entry

Record = dict[str, jax.Array]
"""Site -> activations [L, T, ...] of one run, at the columns of a window."""


@dataclass(frozen=True)
class Unit:
    """A kind of unit.

    Attributes:
        axis: letter of the index within a layer, or "" where a layer has one.
        coordinate: name of that index in result tables.
        site: the activation that is swapped.
        mid: whether the patched residual stream is residual_mid (the layer's MLP still runs) or residual_out.
        many: swept layer by layer in chunks of one layer; otherwise all layers go together.
    """

    axis: str
    coordinate: str
    site: str
    mid: bool
    many: bool


UNITS: dict[str, Unit] = {
    "neuron": Unit("F", "neuron_index", "neuron", False, True),
    "window": Unit("F", "window_index", "neuron", False, True),
    "head_out": Unit("N", "head_index", "head_out", True, False),
    "attention_out": Unit("", "", "attention_out", True, False),
    "mlp_out": Unit("", "", "mlp_out", False, False),
    "residual_out": Unit("", "", "residual_out", False, False),
}

EXPERT = ("expert", "expert_neuron")
"""Where a neuron of a mixture is: its expert, and its index within it. `neuron_index` counts expert by expert."""


def check_units(units: Any) -> tuple[str, ...]:
    """The units as a tuple in the order of `UNITS`; a UserError with the nearest names where one is unknown."""
    for unit in units:
        if unit not in UNITS:
            raise unknown("unit", unit, UNITS)
    if not units:
        raise UserError(f"Give at least one unit of: {', '.join(UNITS)}.")
    return tuple(unit for unit in UNITS if unit in units)


def units_per_layer(config: ModelConfig, unit: str, window: int) -> int:
    """How many units of a kind one layer has."""
    if unit == "window":
        return -(-config.neurons // window)
    return config.sizes[UNITS[unit].axis] if UNITS[unit].axis else 1


def recorded_sites(config: ModelConfig, units: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites that must be recorded in the base run and in the source run."""
    swapped = {UNITS[unit].site for unit in units}
    base = swapped | {"residual_mid", "residual_out"} | ({"mlp_raw", "attention_raw", "residual_in"} if config.post_norm else set())
    base |= {"routing"} if config.experts and "neuron" in swapped else set()
    always = {"router_logits"} if config.experts else set()
    return tuple(sorted(base | always)), tuple(sorted(swapped | always))


def _layer_of(config: ModelConfig, params: Params, layer: Any) -> Any:
    return open_block(config, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), params["blocks"]))


@partial(jax.jit, static_argnames=("config", "width"))
def neuron_rows(
    config: ModelConfig, params: Params, base: Record, source: Record, layer: Any, slots: Any, patched: Any, units: jax.Array, width: int
) -> jax.Array:
    """residual_out of one layer with windows of `width` adjacent neurons swapped for their source values.

    Neuron j changes the MLP's output by `delta_j * W_down[j]`: no MLP matmul is run again. In a mixture of experts that is times
    the weight of j's expert in the base run, where routing at this layer stays as it was; later layers route anew.

    Args:
        slots: int [T], which recorded columns the window has.
        patched: bool [T], the columns where values are swapped.
        units: int [U], index of each row's window; -1 leaves the row at base.

    Returns:
        float32 [U,T,D].
    """
    block = _layer_of(config, params, layer)
    at = {name: record[layer][slots] for name, record in base.items()}
    wanted = source["neuron"][layer][slots].astype(jnp.float32)
    delta = jnp.where(patched[:, None], wanted - at["neuron"].astype(jnp.float32), 0.0)
    index = units[:, None] * width + jnp.arange(width)
    valid = (units[:, None] >= 0) & (index < config.neurons)
    index = jnp.clip(index, 0, config.neurons - 1)
    if config.experts:
        delta = delta * jnp.repeat(at["routing"], config.sizes["M"], axis=-1)
    moved = jnp.where(valid, delta[:, index], 0.0)  # [T, U, width]
    vectors = matrix_rows(config, params, "down", layer, index)  # [U, width, D]
    rows = jnp.einsum("TUE,UED->UTD", moved, vectors, precision="highest")
    if not config.post_norm:
        return at["residual_out"] + rows * config.residual_scale
    return at["residual_mid"] + block.post(at["mlp_raw"] + rows, "mlp_post_norm")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModuleUnits:
    """Rows of one module chunk: int [U] each. `kind` indexes the swept kinds (-1: base), `index` is the head."""

    kind: Any
    layer: Any
    index: Any


@partial(jax.jit, static_argnames=("config", "kinds"))
def module_rows(
    config: ModelConfig, params: Params, base: Record, source: Record, slots: Any, patched: Any, units: ModuleUnits, kinds: tuple[str, ...]
) -> Entry:
    """Patched residual streams of heads and whole modules of any layers, float32 [U,T,D], and where each enters the stream."""

    def at(record: Record, name: str) -> jax.Array:
        return record[name][units.layer][:, slots].astype(jnp.float32)

    swap = patched[None, :, None]
    rows = at(base, "residual_out")
    mid = jnp.zeros(units.kind.shape, bool)
    for number, kind in enumerate(kinds):
        if kind == "head_out":
            patch = _head_rows(config, params, base, source, slots, patched, units, at)
        else:
            delta = jnp.where(swap, at(source, kind) - at(base, kind), 0.0)
            patch = at(base, "residual_mid" if UNITS[kind].mid else "residual_out") + delta
        here = units.kind == number
        rows = jnp.where(here[:, None, None], patch, rows)
        mid = jnp.where(here, UNITS[kind].mid, mid)
    return Entry(rows, units.layer, mid)


def _head_rows(
    config: ModelConfig, params: Params, base: Record, source: Record, slots: Any, patched: Any, units: ModuleUnits, at: Any
) -> jax.Array:
    """residual_mid with one head's output swapped: head n changes the output projection by `delta_n @ W_O[n]`."""

    def head_values(record: Record) -> jax.Array:
        return record["head_out"][units.layer, :, units.index][:, slots].astype(jnp.float32)  # [U, T, H]

    delta = jnp.where(patched[None, :, None], head_values(source) - head_values(base), 0.0)
    rows = contract("UTH,UHD->UTD", delta, matrix_rows(config, params, "out", units.layer, units.index))
    if not config.post_norm:
        return at(base, "residual_mid") + rows * config.residual_scale
    scale = params["blocks"]["attention_post_norm"][units.layer][:, None]
    raw = at(base, "attention_raw") + rows
    return at(base, "residual_in") + normalise(config, raw, scale) * config.residual_scale


def chunk_rows(units: int, per_device: int, devices: int) -> np.ndarray:
    """Unit numbers of every row, int [chunks, devices, 1 + per_device]; -1 is the base, which leads every device's share."""
    chunks = -(-units // (per_device * devices))
    padded = np.full(chunks * per_device * devices, -1, np.int32)
    padded[:units] = np.arange(units)
    rows = padded.reshape(chunks, devices, per_device)
    return np.concatenate([np.full((chunks, devices, 1), -1, np.int32), rows], axis=2)
