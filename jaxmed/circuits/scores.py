"""Edge attribution: scores of all edges of a batch of pairs, from the runs of both prompts and one backward pass per point.

score(u -> v) = (what u writes in source - what it writes in base) . gradient of the outcome in what v reads, summed over tokens. EAP (Syed
et al. 2023, arXiv 2310.10348) takes the gradient at base; EAP-IG (Hanna et al. 2024, arXiv 2403.17806) its mean over points
source + (k / m) (base - source), k = 1..m, of the embedded prompts. In that literature's words base is the clean run and source the
corrupted one.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.circuits.nodes import Cached, Seen, write, write_heads, write_mlp
from jaxmed.circuits.rows import CircuitRows, outcomes_of
from jaxmed.effects.readout import Readout
from jaxmed.interventions.edits import TokenIndex
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.params import Params
from jaxmed.models.rope import layer_windows
from jaxmed.models.transformer import open_block
from jaxmed.runner import Layout, Prefix, Ran, Recording, run, run_tokens

SITES = ("residual_in", "residual_mid", "head_out", "mlp_out")


class Streams(NamedTuple):
    """What a run leaves at a window.

    Attributes:
        entering, middle: float32 [L, B, T, D], what heads and MLPs read.
        last: float32 [B, T, D].
        written: float32 [B, U, T, D], what every sender writes, in the graph's order.
    """

    entering: Any
    middle: Any
    last: Any
    written: Any


class Ends(NamedTuple):
    """The two runs of a batch of pairs.

    Attributes:
        base, source: at the window.
        cached: keys and values of all tokens of base, [L, B, S, K, H]; those before the window are source's, too.
        seen: how the window's tokens see.
        outcome: float32 [2, B], of base and source.
    """

    base: Streams
    source: Streams
    cached: Cached
    seen: Seen
    outcome: Any


@partial(jax.jit, static_argnames=("config", "window", "readout"))
def run_ends(config: ModelConfig, params: Params, rows: CircuitRows, window: int, readout: Readout) -> Ends:
    """Both runs of a batch of pairs, at windows of so many tokens."""
    columns = rows.start[:, None] + jnp.arange(window)[None]
    count, length = rows.base.shape
    layout = Layout(rows.position, rows.visible, TokenIndex(jnp.broadcast_to(jnp.arange(length), (count, length)), jnp.full(count, length)))
    ran = [
        run_tokens(config, params, tokens, layout, Recording(SITES, keep=keep), columns=columns)
        for tokens, keep in ((rows.base, True), (rows.source, False))
    ]
    base, source = (_streams(config, params, one, columns) for one in ran)
    outcome = jnp.stack([outcomes_of(config, params, readout, side.last, rows.reads) for side in (base, source)])
    take = jax.vmap(lambda array, at: array[at])
    visible = jax.vmap(lambda array, at: array[at][:, at])(rows.visible, columns)
    seen = Seen(take(rows.position, columns), visible, jnp.arange(length)[None] < rows.start[:, None])
    assert ran[0].kept is not None
    return Ends(base, source, Cached(*ran[0].kept), seen, outcome)


def _streams(config: ModelConfig, params: Params, ran: Ran, columns: jax.Array) -> Streams:
    """The run at the window, with what every node wrote."""
    taps = ran.taps
    each = lambda layer: write(config, open_block(config, layer[0]), layer[1])  # noqa: E731
    layers = params["blocks"], taps["head_out"]
    heads = jax.vmap(each)(layers) if config.mesh is None else jax.lax.map(each, layers)  # one layer's weights are gathered at a time
    written = jnp.concatenate([heads, taps["mlp_out"].astype(jnp.float32)[:, :, None]], axis=2)
    written = jnp.moveaxis(written, 0, 1).reshape(len(columns), -1, *written.shape[3:])
    embedded = taps["residual_in"][0]
    last = jnp.take_along_axis(ran.stream, columns[..., None], axis=1)
    return Streams(taps["residual_in"], taps["residual_mid"], last, jnp.concatenate([embedded[:, None], written], axis=1))


@partial(jax.jit, static_argnames=("config", "readout"))
def point_scores(config: ModelConfig, params: Params, rows: CircuitRows, ends: Ends, part: Any, readout: Readout) -> jax.Array:
    """Scores float32 [B, senders, receivers] with the gradient at one point; those of no edge are zero or of no meaning.

    Args:
        part: a number, where the point lies: 0 at source, 1 at base.
    """
    source, base = ends.source.entering[0], ends.base.entering[0]
    stream = source + part * (base - source)
    length = rows.base.shape[1]
    index = TokenIndex(rows.start[:, None] + jnp.arange(stream.shape[1])[None], jnp.full(len(stream), length))
    prefix = Prefix(*ends.cached, jnp.broadcast_to(jnp.arange(length), rows.base.shape), ends.seen.before)
    layout = Layout(ends.seen.position, ends.seen.visible, index)
    ran = run(config, params, stream, layout, Recording(("residual_in", "residual_mid")), prefix=prefix)
    gradient = jax.grad(lambda h: outcomes_of(config, params, readout, h, rows.reads).sum())(ran.stream)
    change = ends.source.written - ends.base.written
    layers = params["blocks"], ran.taps["residual_in"], ran.taps["residual_mid"], ends.cached, layer_windows(config)
    _, scores = jax.lax.scan(partial(_step, config, change, ends.seen), gradient, layers, reverse=True)
    last = contract("BUTD,BTD->BU", change, gradient)
    scores = jnp.moveaxis(scores, 0, 2)  # [B, U, L, per layer]
    return jnp.concatenate([scores.reshape(*scores.shape[:2], -1), last[..., None]], axis=-1)


def _step(config: ModelConfig, change: jax.Array, seen: Seen, gradient: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
    """One block backwards: the gradient of its output [B,T,D] -> of its input; and the scores [B,U,3N+1] of edges into it."""
    arrays, entering, middle, cached, window = layer
    _, pull_mlp = jax.vjp(partial(write_mlp, config, arrays), middle)
    (of_mlp,) = pull_mlp(gradient)
    gradient = gradient + of_mlp

    def heads(inputs: jax.Array) -> jax.Array:
        return write_heads(config, arrays, inputs, seen, cached, window).sum(1)

    inputs = jnp.broadcast_to(entering[:, None, None], (len(entering), 3, config.heads, *entering.shape[1:]))
    _, pull_heads = jax.vjp(heads, inputs)
    (of_heads,) = pull_heads(gradient)
    read = jnp.concatenate([of_heads.reshape(len(entering), -1, *entering.shape[1:]), of_mlp[:, None]], axis=1)
    return gradient + of_heads.sum((1, 2)), contract("BUTD,BYTD->BUY", change, read)
