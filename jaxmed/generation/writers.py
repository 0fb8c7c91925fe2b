"""What writes: prompts go in, and a few tokens of every row come out at each call.

On the CPU a writer runs layer by layer on one device. Weights that lie on their own are multiplied where they lie, and by all cores; a
loop over stacked weights copies each matrix first, which takes longer than one row's product with it. Elsewhere, and where the weights
are split over devices, one program writes several tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_sharding
from jaxmed.generation.sampling import Sampling, choose
from jaxmed.interventions.edits import Edit, TokenIndex
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.models.transformer import embed
from jaxmed.runner import Layout, Prefix, Ran, Recording, causal_layout, each_layer, extend, lies_by_layer, run, run_tokens

AT_ONCE = 16
"""Tokens that one call writes on accelerators, where every call costs the host's attention."""
KEEP = Recording(keep=True)
Edits = dict[str, Edit]


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together.

    Attributes:
        tokens: int [B,S], padded at the left.
        padding: int [B], columns of padding.
        room: tokens that may follow.
        read, written: edits that act on the prompts' tokens, and on those that follow.
        sampling: how tokens are chosen; `keys` has B rows.
    """

    tokens: np.ndarray | jax.Array
    padding: np.ndarray
    room: int
    read: Edits
    written: Edits
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where the newest token of every text is.

    Attributes:
        padding: int [B], columns of padding at the left of every prompt.
        length: int, columns of the prompts.
        step: int, how many tokens have been written before the newest.
    """

    padding: Any
    length: Any
    step: Any

    @property
    def column(self) -> Any:
        return self.length + self.step

    def layout(self) -> Layout:
        """The layout of the newest token."""
        position = (self.column - self.padding)[:, None]
        return Layout(position, jnp.ones((1, 1, 1), bool), TokenIndex(position, self.length - self.padding))

    def prefix(self, key: jax.Array, value: jax.Array) -> Prefix:
        """What the newest token sees in a cache [L,B,S,K,H]."""
        columns = jnp.arange(key.shape[2])[None]
        counted = columns - self.padding[:, None]
        return Prefix(key, value, counted, (columns < self.column) & (counted >= 0))


@runtime_checkable
class Writer(Protocol):
    """Writes: [k, B] tokens at every step, without end; the first are those that follow the prompts."""

    def __call__(self, model: Model, batch: Batch) -> Iterator[np.ndarray]: ...


def writer(model: Model) -> Writer:
    """The writer for a model's devices."""
    return write_by_layer if lies_by_layer(model.params) else write_at_once


@partial(jax.jit, static_argnames="config")
def read_prompts(config: ModelConfig, params: Params, tokens: jax.Array, padding: jax.Array, edits: Edits) -> Ran:
    """Prompts int [B,S], padded at the left by `padding` int [B] -> their last residual streams [B,1,D], and keys and values."""
    ran = run_tokens(config, params, tokens, causal_layout(tokens.shape[0], tokens.shape[1], padding), KEEP, edits=edits)
    return ran._replace(stream=ran.stream[:, -1:])


def write_by_layer(model: Model, batch: Batch) -> Iterator[np.ndarray]:
    """One token at every step, on one device of this host, by a program of one layer."""
    config = model.config
    params = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, model.params)
    device = jax.tree.leaves(params)[0].device
    batch, padding = placed(batch, device), jax.device_put(batch.padding, device)
    stream, _, kept = read_prompts(config, params, batch.tokens, padding, batch.read)
    assert kept is not None
    caches = _open_caches(kept, batch.room)
    place = jax.device_put(Place(padding, np.int32(batch.tokens.shape[1]), np.int32(-1)), device)
    top, blocks = {name: held for name, held in params.items() if name != "blocks"}, each_layer(params["blocks"])
    numbers = [jax.device_put(np.int32(number), device) for number in range(config.layers)]
    while True:
        token, stream, place = choose_next(config, top, stream, place, batch.sampling)
        yield np.asarray(token)[None]
        new = []
        for block, number, cache in zip(blocks, numbers, caches, strict=True):
            stream, kept = _run_layer(config, block, stream, number, cache, place, batch.written)
            new.append(kept)
        caches = _store(caches, new, place)


def placed(batch: Batch, where: Any) -> Batch:
    """The batch with its arrays on a device or in a sharding of their rows; the edits replicated."""
    everywhere = jax.NamedSharding(where.mesh, jax.P()) if isinstance(where, jax.NamedSharding) else where
    return replace(
        batch,
        tokens=jax.device_put(batch.tokens, where),
        read=jax.device_put(batch.read, everywhere),
        written=jax.device_put(batch.written, everywhere),
        sampling=replace(batch.sampling, keys=jax.device_put(batch.sampling.keys, where)),
    )


Cache = tuple[jax.Array, jax.Array]
"""Keys [K,B,H,S] and values [K,B,S,H] of a layer, in the orders in which the CPU multiplies them: others would be copied first."""


@partial(jax.jit, static_argnames="room")
def _open_caches(kept: tuple[jax.Array, jax.Array], room: int) -> list[Cache]:
    """Keys and values [L,B,S,K,H] as caches of every layer with room for `room` columns more."""
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))) for x in kept)
    return [_as_cache(*each) for each in zip(key, value, strict=True)]


def _as_cache(key: jax.Array, value: jax.Array) -> Cache:
    """Keys and values [B,S,K,H] in the cache's orders."""
    return jnp.transpose(key, (2, 0, 3, 1)), jnp.transpose(value, (2, 0, 1, 3))


@partial(jax.jit, static_argnames="config")
def _run_layer(
    config: ModelConfig, arrays: Params, stream: jax.Array, number: jax.Array, cache: Cache, place: Place, edits: Edits
) -> tuple[jax.Array, Cache]:
    """A layer on the newest token's residual stream [B,1,D], and its keys and values as a cache of one column."""
    key, value = jnp.transpose(cache[0], (1, 3, 0, 2)), jnp.transpose(cache[1], (1, 2, 0, 3))
    prefix = place.prefix(key[None], value[None])
    ran = run(config, {"blocks": arrays}, stream, place.layout(), KEEP, first=number, prefix=prefix, edits=edits)
    assert ran.kept is not None
    return ran.stream, _as_cache(ran.kept[0][0], ran.kept[1][0])


@partial(jax.jit, donate_argnames="caches")
def _store(caches: list[Cache], new: list[Cache], place: Place) -> list[Cache]:
    """The caches with the newest token's keys and values. A program of its own: the one that reads them would copy them to write."""
    stored = lambda cache, new: (put(cache[0], new[0], place.column, 3), put(cache[1], new[1], place.column, 2))  # noqa: E731
    return [stored(*each) for each in zip(caches, new, strict=True)]


def put(held: jax.Array, new: jax.Array, column: jax.Array, axis: int) -> jax.Array:
    """A cache with the newest token's keys or values at a column of `axis`."""
    return jax.lax.dynamic_update_slice_in_dim(held, new, column, axis)


@partial(jax.jit, static_argnames="config")
def choose_next(
    config: ModelConfig, params: Params, stream: jax.Array, place: Place, sampling: Sampling
) -> tuple[jax.Array, jax.Array, Place]:
    """The tokens int [B] after residual streams [B,1,D], their embeddings [B,1,D], and their place."""
    place = replace(place, step=place.step + 1)
    token = choose(config, params, stream[:, -1], place.step, sampling)
    return token, embed(config, params, token[:, None], place.layout().position), place


def tokens_at_once(mesh: jax.sharding.Mesh) -> int:
    """How many tokens a call of `write_at_once` writes.

    One on the CPU, where XLA (jaxlib 0.10) reads stale keys and values from caches that a loop carries, on two devices from eight rows
    each on.
    """
    return 1 if mesh.devices.flat[0].platform == "cpu" else AT_ONCE


def write_at_once(model: Model, batch: Batch) -> Iterator[np.ndarray]:
    """Tokens on all devices, several at every step on accelerators."""
    config, params, mesh = model.config, model.params, model.mesh
    count = min(tokens_at_once(mesh), batch.room)
    rows = row_sharding(mesh)
    batch, padding = placed(batch, rows), jax.device_put(batch.padding, rows)
    stream, _, kept = read_prompts(config, params, batch.tokens, padding, batch.read)
    assert kept is not None
    place = Place(padding, np.int32(batch.tokens.shape[1]), np.int32(-1))
    token, _, place = choose_next(config, params, stream, place, batch.sampling)
    yield np.asarray(token)[None]
    room = -(-batch.room // count) * count
    cache = jax.jit(lambda kept: tuple(jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))) for x in kept))(kept)
    while True:
        token, place, cache, tokens = _write_tokens(config, params, (token, place, cache), batch.written, batch.sampling, count)
        yield np.asarray(tokens)


State = tuple[jax.Array, Place, tuple[jax.Array, ...]]
"""The newest tokens int [B], their place, and keys and values [L,B,S,K,H]."""


@partial(jax.jit, static_argnames=("config", "count"), donate_argnames="state")
def _write_tokens(
    config: ModelConfig, params: Params, state: State, edits: Edits, sampling: Sampling, count: int
) -> tuple[jax.Array, Place, tuple[jax.Array, ...], jax.Array]:
    """The state after `count` tokens more of every text, and these int [count,B]."""

    def step(state: State, _: None) -> tuple[State, jax.Array]:
        token, place, (key, value) = state
        ran = extend(config, params, token[:, None], place.layout(), place.prefix(key, value), KEEP, edits=edits)
        assert ran.kept is not None
        cache = tuple(put(held, new, place.column, 2) for held, new in zip((key, value), ran.kept, strict=True))
        token, _, place = choose_next(config, params, ran.stream, place, sampling)
        return (token, place, cache), token

    (token, place, cache), tokens = jax.lax.scan(step, state, None, length=count)
    return token, place, cache, tokens
