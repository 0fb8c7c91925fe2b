"""First-order effects of every unit of a batch of pairs: what a unit changes times how the outcome answers to it, at the base run.

Attribution patching (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745). The base run keeps the residual stream between blocks and nothing
of their insides; a reverse loop then opens one block at a time, takes its part of the gradient, and leaves of it one number per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.effects.grad_drop import dropped_rows, with_drops
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.pair_batches import PairRows, Row
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Record
from jaxmed.interventions.edits import Edit, TokenIndex
from jaxmed.interventions.sites import SITES
from jaxmed.models.config import ModelConfig
from jaxmed.models.params import Params
from jaxmed.models.rules import Rules
from jaxmed.runner import Layout, Prefix, Recording, logits_of, run, run_tokens


def sites_of(units: Sequence[str]) -> tuple[str, ...]:
    """The sites that units of these kinds swap."""
    return tuple(sorted({site for unit in units for site in MEDIATORS[unit].sites}))


def narrow(sites: Sequence[str]) -> tuple[str, ...]:
    """Those of the sites that are as wide as the residual stream: base runs keep them. The others are seen when their block is opened."""
    return tuple(site for site in sites if SITES[site].axes == "BTD")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Base:
    """What the base runs of a batch leave behind.

    Attributes:
        record: sites [L, B, W, ...] at the window's columns; "residual_in" is among them.
        key, value: [L, B, T, K, H].
        outcome: float32 [O, B].
        gradient: float32 [O, B, W, D], of the outcomes in the last residual stream.
    """

    record: Record
    key: Any
    value: Any
    outcome: Any
    gradient: Any


@partial(jax.jit, static_argnames=("config", "taps", "readout"))
def run_source(
    config: ModelConfig, params: Params, pairs: PairRows, taps: tuple[str, ...], readout: Readout
) -> tuple[Record, jax.Array, jax.Array]:
    """Sites of the source runs [L, B, W, ...], aligned to the window; their outcomes float32 [O, B]; and the log-probabilities of their
    next tokens, float32 [B, V] where an outcome needs them, else [B, 0]."""
    ran = _run_rows(config, params, pairs.source, Recording(taps))
    return ran.taps, *_read(config, params, ran.stream, pairs.source.reads, readout)


def read_rows(config: ModelConfig, params: Params, rows: Row, readout: Readout) -> tuple[jax.Array, jax.Array]:
    """Outcomes float32 [O, B] of whole runs, and the log-probabilities of their next tokens as `run_source` returns them. The outcomes
    compare a run with what its reads hold of another, and with itself where they hold nothing."""
    return _read(config, params, _run_rows(config, params, rows, Recording(())).stream, rows.reads, readout)


def _read(config: ModelConfig, params: Params, stream: jax.Array, reads: Any, readout: Readout) -> tuple[jax.Array, jax.Array]:
    h = _take(stream, reads.slots)
    alone = readout.needs_source and not reads.source.shape[-1]
    target = jax.nn.log_softmax(logits_of(config, params, h[:, 0])) if alone else reads.source
    return _outcomes(config, params, h, replace(reads, source=target), readout), target


@partial(jax.jit, static_argnames=("config", "taps", "readout"))
def run_base(config: ModelConfig, params: Params, pairs: PairRows, taps: tuple[str, ...], readout: Readout) -> Base:
    """The base runs, and the first step of their gradients."""
    ran = _run_rows(config, params, pairs.base, Recording(("residual_in", *taps), keep=True))
    key, value = ran.kept
    return Base(ran.taps, key, value, *read_gradient(config, params, _take(ran.stream, pairs.base.columns), pairs.base.reads, readout))


def read_gradient(config: ModelConfig, params: Params, window: jax.Array, reads: Any, readout: Readout) -> tuple[jax.Array, jax.Array]:
    """Outcomes float32 [O,B] of last residual streams [B,W,D] of a batch's windows, and their gradients in these [O,B,W,D]."""
    outcomes = lambda h: _outcomes(config, params, h, reads, readout)  # noqa: E731
    outcome, pull = jax.vjp(outcomes, _take(window, reads.slots))
    every = jnp.broadcast_to(jnp.eye(len(outcome))[..., None], (len(outcome), *outcome.shape))
    (read,) = jax.vmap(pull)(every)  # [O, B, R, D]
    rows = jnp.arange(window.shape[0])[:, None]
    return outcome, jax.vmap(lambda g: jnp.zeros_like(window).at[rows, reads.slots].add(g))(read)


def _run_rows(config: ModelConfig, params: Params, rows: Row, recording: Recording) -> Any:
    count, length = rows.tokens.shape
    index = TokenIndex(jnp.broadcast_to(jnp.arange(length), (count, length)), jnp.full(count, length))
    layout = Layout(rows.position, rows.visible, index)
    return run_tokens(config, params, rows.tokens, layout, recording, columns=rows.columns)


def _outcomes(config: ModelConfig, params: Params, h: jax.Array, reads: Any, readout: Readout) -> jax.Array:
    """Outcomes float32 [O, B] of the last residual streams h [B,R,D] of a batch, each read in its own way."""
    one = lambda h, reads: readout(config, params, h[None], reads)[:, 0]  # noqa: E731
    return jax.vmap(one, out_axes=1, spmd_axis_name="data")(h, reads)


def _take(values: jax.Array, columns: jax.Array) -> jax.Array:
    """values [B,T,...] at columns int [B,W]: [B,W,...]."""
    return jnp.take_along_axis(values, columns.reshape(*columns.shape, *(1,) * (values.ndim - 2)), axis=1)


def window_layout(pairs: PairRows) -> Layout:
    """How the windows' tokens see each other."""
    count, window = pairs.base.columns.shape
    offset = pairs.start[:, None] + jnp.arange(window)[None]
    index = TokenIndex(offset, jnp.full(count, pairs.base.tokens.shape[1]))
    return Layout(_take(pairs.base.position, pairs.base.columns), pairs.visible, index)


def cached_of(pairs: PairRows, base: Base) -> tuple[jax.Array, jax.Array] | None:
    """Keys and values [L,B,T,K,H] that windows see of earlier tokens; None where windows are whole rows."""
    return (base.key, base.value) if pairs.base.columns.shape[1] < pairs.base.tokens.shape[1] else None


class _Layer(NamedTuple):
    """What differs between layers."""

    arrays: Params
    number: jax.Array
    stream: jax.Array
    cached: tuple[jax.Array, jax.Array] | None
    written: Record
    kept: Record


@partial(jax.jit, static_argnames=("config", "units", "width", "rules", "first", "drops"))
def estimate(
    config: ModelConfig, params: Params, pairs: PairRows, base: Base, written: Record, units: tuple[str, ...], width: int, rules: Rules,
    first: int, drops: bool = False,
) -> Record:  # fmt: skip
    """First-order effects of all units of the layers from `first` on: unit -> float32 [L - first, O, B, P, count].

    With `drops` a unit's `graddrop` too: the mean of its absolute effects over backwards that skip one other layer each.

    Args:
        written: sites [L, B, W, ...], what is written in the place of the base values.
        width: neurons of a window.
        rules: what gradients flow through.
    """
    cached = jax.tree.map(lambda values: values[first:], cached_of(pairs, base))
    dropped, gradient = dropped_rows(base.gradient, first, config.layers) if drops else (None, base.gradient)
    step = partial(_step, config, pairs, window_layout(pairs), units, width, rules, dropped)
    blocks = jax.tree.map(lambda stack: stack[first:], params["blocks"])
    changes = {site: written[site][first:] for site in sites_of(units)}
    kept = {site: base.record[site][first:] for site in narrow(sites_of(units))}
    layers = _Layer(blocks, first + jnp.arange(config.layers - first), base.record["residual_in"][first:], cached, changes, kept)
    return jax.lax.scan(step, gradient, layers, reverse=True)[1]


def _step(
    config: ModelConfig, pairs: PairRows, layout: Layout, units: tuple[str, ...], width: int, rules: Rules, dropped: jax.Array | None,
    gradient: jax.Array, at: _Layer,
) -> tuple[jax.Array, Record]:  # fmt: skip
    """One block backwards: its output's gradient [O,B,W,D] -> its input's, and the effects of its units."""
    sites, prefix = sites_of(units), prefix_of(pairs, at.cached)
    opened = tuple(site for site in sites if site not in at.kept)

    def block(stream: jax.Array, moved: Record) -> tuple[jax.Array, Record]:
        edits = {site: Edit(0.0, 0.0, change[None]) for site, change in moved.items()}
        one = {"blocks": jax.tree.map(lambda x: x[None], at.arrays)}
        number = at.number if config.layers > 1 else 0
        ran = run(config, one, stream, layout, Recording(opened, rules=rules), first=number, prefix=prefix, edits=edits)
        return ran.stream, {site: values[0] for site, values in ran.taps.items()}

    still = {site: jnp.zeros(at.written[site].shape, jnp.float32) for site in sites}
    _, pull, values = jax.vjp(block, at.stream, still, has_aux=True)
    before, by_site = jax.vmap(pull)(gradient)
    values |= at.kept
    change = {site: at.written[site].astype(jnp.float32) - values[site].astype(jnp.float32) for site in sites}
    effects = unit_effects(config, pairs, units, width, change, {**by_site, END: gradient})
    if dropped is None:
        return before, effects
    skips = jnp.repeat(dropped == at.number, len(gradient) // len(dropped))[:, None, None, None]
    return jnp.where(skips, gradient, before), with_drops(effects, dropped, at.number, config.layers)


END = "end of the layer"
"""Where the gradient is taken for sites that are swapped together: they do not answer to each other."""


def unit_effects(config: ModelConfig, pairs: PairRows, units: tuple[str, ...], width: int, change: Record, gradient: Record) -> Record:
    """Effects float32 [O,B,P,count] of a layer's units, of each kind, from changes [B,W,...] and gradients [O,B,W,...] of sites."""
    found: Record = {}
    for unit in units:
        mediator = MEDIATORS[unit]
        ways = [(site, site if len(mediator.sites) == 1 else END) for site in mediator.sites]
        parts = [_product(pairs, mediator.axis, site, change[site], gradient[way]) for site, way in ways]
        found[unit] = _grouped(sum(parts[1:], parts[0]), mediator.width(width), mediator.count(config, width))
    return found


def _product(pairs: PairRows, axis: str, site: str, change: jax.Array, gradient: jax.Array) -> jax.Array:
    """Change times gradient, summed over a patch's tokens and the elements of each place on the axis: [O,B,P,U]."""
    count, patches, tokens = pairs.slots.shape
    size = change.shape[SITES[site].axes.index(axis)] if axis else 1
    slots = pairs.slots.reshape(count, patches * tokens)
    change = _take(change, slots).reshape(count, patches, tokens, size, -1)
    change = jnp.where(pairs.patched[..., None, None], change, 0.0)
    gradient = jax.vmap(_take, (0, None))(gradient, slots).reshape(-1, *change.shape)
    return (change[None] * gradient).sum((3, 5))


def _grouped(effects: jax.Array, width: int, count: int) -> jax.Array:
    """Effects [..., U] of elements -> of `count` groups of `width` adjacent ones each, the last one perhaps short."""
    short = count * width - effects.shape[-1]
    padded = jnp.pad(effects, (*((0, 0),) * (effects.ndim - 1), (0, short))) if short else effects
    return padded if width == 1 else padded.reshape(*effects.shape[:-1], count, width).sum(-1)


def prefix_of(pairs: PairRows, cached: tuple[jax.Array, jax.Array] | None) -> Prefix | None:
    """Earlier tokens of the base runs, from one layer's keys and values [B,T,K,H]."""
    if cached is None:
        return None
    before = jnp.broadcast_to(jnp.arange(cached[0].shape[1]), cached[0].shape[:2])
    return Prefix(cached[0][None], cached[1][None], before, before < pairs.start[:, None])
