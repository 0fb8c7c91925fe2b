"""The fast form of mediators: the residual stream that each unit's patch leaves at its layer, one vector per unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import ACTIVATIONS, contract, normalise
from jaxmed.models.params import Params
from jaxmed.models.transformer import matrix_rows

Record = dict[str, jax.Array]
"""Site -> activations [L, W, ...] of one run, at the columns of a window."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What both runs left at the columns of one window.

    Attributes:
        base, source: their records; the source's columns are aligned to the base's.
        slots: int [T], which recorded columns the window has.
        patched: bool [P, T], the columns where values are swapped, of every patch that shares the window.
    """

    base: Record
    source: Record
    slots: Any
    patched: Any

    def at(self, record: Record, site: str, layer: jax.Array) -> jax.Array:
        """A site of one run at layers int [U]: float32 [U,T,...]."""
        return record[site][layer[:, None], self.slots[None]].astype(jnp.float32)

    def swapped(self, picks: Picks) -> jax.Array:
        """The columns that each row swaps: bool [U,T], or [1,T] where there is one patch."""
        return self.patched[:1] if picks.patch is None else self.patched[picks.patch]

    def change(self, site: str, picks: Picks) -> jax.Array:
        """Source minus base where values are swapped, zero elsewhere: [U,T,D]."""
        change = self.at(self.source, site, picks.layer) - self.at(self.base, site, picks.layer)
        return jnp.where(self.swapped(picks)[..., None], change, 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Picks:
    """The units of a chunk's rows: int [U] each. `kind` indexes the chunk's mediators (-1: the row stays at base), `patch` the window's
    patches (None: its only one)."""

    kind: Any
    layer: Any
    index: Any
    patch: Any = None


Rows = Callable[[ModelConfig, Params, View, Picks, int], jax.Array]
"""(config, params, view, picks, width) -> the patched residual stream at its entry, float32 [U,T,D]."""


def after_module(config: ModelConfig, params: Params, view: View, picks: Picks, module: str, change: jax.Array) -> jax.Array:
    """The residual stream behind a module ("attention" or "mlp") whose raw output changes by `change` [U,T,D]."""
    before, after = {"attention": ("residual_in", "residual_mid"), "mlp": ("residual_mid", "residual_out")}[module]
    if not config.post_norm:
        return view.at(view.base, after, picks.layer) + change * config.residual_scale
    raw = view.at(view.base, f"{module}_raw", picks.layer) + change
    name = f"{module}_post_norm"
    scale, bias = (params["blocks"].get(n) for n in (name, name + "_bias"))
    normed = normalise(config, raw, scale[picks.layer][:, None], None if bias is None else bias[picks.layer][:, None])
    return view.at(view.base, before, picks.layer) + normed * config.residual_scale


Taken = Callable[[Record, str], jax.Array]
"""(a run's record, a site) -> the values of every row's neurons there, float32 [U,T,w]."""


def down_rows(change: Callable[[ModelConfig, View, Taken], jax.Array]) -> Rows:
    """Neuron j changes the MLP's output by `delta_j * W_down[j]`: no MLP matmul is run again. In a mixture of experts that is times the
    weight of j's expert in the base run, where routing at this layer stays as it was; later layers route anew.

    Args:
        change: (config, view, taken) -> delta [U,T,w], by how much the input of the down projection changes.
    """

    def rows(config: ModelConfig, params: Params, view: View, picks: Picks, width: int) -> jax.Array:
        index = picks.index[:, None] * width + jnp.arange(width)[None]
        valid = (picks.kind >= 0)[:, None] & (index < config.neurons)
        index = jnp.clip(index, 0, config.neurons - 1)
        layer, slots = picks.layer[:, None, None], view.slots[None, :, None]
        delta = change(config, view, lambda record, site: record[site][layer, slots, index[:, None]].astype(jnp.float32))
        if config.experts:
            delta = delta * view.base["routing"][layer, slots, index[:, None] // config.sizes["M"]]
        delta = jnp.where(view.swapped(picks)[..., None] & valid[:, None], delta, 0.0)
        vectors = matrix_rows(config, params, "down", picks.layer[:, None], index)  # [U, w, D]
        return after_module(config, params, view, picks, "mlp", jnp.einsum("UTw,UwD->UTD", delta, vectors, precision="highest"))

    return rows


def neuron_change(config: ModelConfig, view: View, taken: Taken) -> jax.Array:
    """Source's neuron minus base's."""
    del config
    return taken(view.source, "neuron") - taken(view.base, "neuron")


def gate_change(config: ModelConfig, view: View, taken: Taken) -> jax.Array:
    """The activation of source's gate minus that of base's, times base's up branch where there is one."""
    active = ACTIVATIONS[config.activation]
    change = active(taken(view.source, "gate")) - active(taken(view.base, "gate"))
    return change * taken(view.base, "up") if config.gated else change


def up_change(config: ModelConfig, view: View, taken: Taken) -> jax.Array:
    """The activation of base's gate times source's up branch minus base's."""
    return ACTIVATIONS[config.activation](taken(view.base, "gate")) * (taken(view.source, "up") - taken(view.base, "up"))


def head_rows(config: ModelConfig, params: Params, view: View, picks: Picks, width: int) -> jax.Array:
    """Head n changes the output projection by `delta_n @ W_O[n]`."""
    del width
    at = picks.layer[:, None], view.slots[None], picks.index[:, None]
    values = [record["head_out"][at].astype(jnp.float32) for record in (view.source, view.base)]
    delta = jnp.where(view.swapped(picks)[..., None], values[0] - values[1], 0.0)  # [U, T, H]
    change = contract("UTH,UHD->UTD", delta, matrix_rows(config, params, "out", picks.layer, picks.index))
    return after_module(config, params, view, picks, "attention", change)


def module_rows(entry: str, *sites: str) -> Rows:
    """What whole modules add: the stream at `entry` plus the sites' changes."""

    def rows(config: ModelConfig, params: Params, view: View, picks: Picks, width: int) -> jax.Array:
        del config, params, width
        return view.at(view.base, entry, picks.layer) + sum(view.change(site, picks) for site in sites)

    return rows
