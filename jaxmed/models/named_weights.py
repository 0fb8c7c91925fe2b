"""The matrices that are scored and pruned, under the names and in the shapes of the Hugging Face checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models.checkpoints.tensors import join_layer, layer_tensors, matrix_rules, split_layer
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import FAMILIES
from jaxmed.models.families.table import Rule
from jaxmed.models.model import Model
from jaxmed.models.params import Params

Edit = Callable[[np.ndarray], np.ndarray]
"""Values of chosen numbers of one matrix, [chosen] -> values in their place."""


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every matrix of the blocks, layer by layer."""
    rules = matrix_rules(FAMILIES[config.family])
    return {name: shape for layer in range(config.layers) for rule in rules for name, shape in layer_tensors(rule, config, layer)}


def kind_of(name: str) -> str:
    """The last part of a matrix's name: "q_proj" of "model.layers.3.self_attn.q_proj.weight"."""
    return name.removesuffix(".weight").split(".")[-1]


def inputs_axis(config: ModelConfig) -> int:
    """The axis of the checkpoint's matrices that their inputs lie on."""
    return 0 if FAMILIES[config.family].inputs_first else 1


def named_layers(config: ModelConfig, stacks: Mapping[str, jax.Array], first: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Every matrix by name, from arrays laid out as the blocks' parameters, one layer on the host at a time.

    Args:
        stacks: parameter name -> [layers, ...], layers from `first` on.
    """
    rules = matrix_rules(FAMILIES[config.family])
    for number in range(next(iter(stacks.values())).shape[0]):
        for rule in rules:
            if rule.path[-1] in stacks:
                yield from split_layer(rule, config, first + number, np.asarray(stacks[rule.path[-1]][number]))


def named_weights(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Every matrix of a model by name, in its dtype, one layer on the host at a time."""
    stacks = {rule.path[-1]: model.params["blocks"][rule.path[-1]] for rule in matrix_rules(FAMILIES[model.config.family])}
    return named_layers(model.config, stacks)


class NamedWeights(Mapping[str, np.ndarray]):
    """Every matrix of a model by name, in its dtype; the tensors of one layer's parameter are on the host at a time."""

    def __init__(self, model: Model):
        self.config, self.blocks = model.config, model.params["blocks"]
        rules = matrix_rules(FAMILIES[model.config.family])
        layers = range(model.config.layers)
        self.places = {name: (rule, layer) for layer in layers for rule in rules for name, _ in layer_tensors(rule, self.config, layer)}
        self.held: tuple[Any, dict[str, np.ndarray]] = (None, {})

    def __getitem__(self, name: str) -> np.ndarray:
        rule, layer = self.places[name]
        if self.held[0] != (rule.path, layer):
            found = split_layer(rule, self.config, layer, np.asarray(self.blocks[rule.path[-1]][layer]))
            self.held = (rule.path, layer), dict(found)
        return self.held[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def weights_by_name(model: Model) -> NamedWeights:
    """Matrix -> its weights, read when they are asked for."""
    return NamedWeights(model)


def with_edited(config: ModelConfig, params: Params, chosen: Mapping[str, np.ndarray], edit: Edit) -> Params:
    """Parameters with some numbers of some matrices replaced; all others keep their bits.

    Only the chosen numbers cross to the host; every device copies its own part of a parameter and puts its own numbers in.

    Args:
        chosen: matrix -> flat indices, in the checkpoint's layout.
    """
    blocks = dict(params["blocks"])
    for rule in matrix_rules(FAMILIES[config.family]):
        names = [[name for name, _ in layer_tensors(rule, config, layer)] for layer in range(config.layers)]
        counts = [sum(len(chosen.get(name, NOTHING)) for name in layer) for layer in names]
        stack, write = blocks[rule.path[-1]], _write
        for layers in _spans(counts):
            here = {layer: [chosen.get(name, NOTHING) for name in names[layer]] for layer in layers}
            stack = _edited(config, rule, stack, here, edit, write)
            write = _write_on  # what came is copied once, then that copy is edited
        blocks[rule.path[-1]] = stack
    return {**params, "blocks": blocks}


NOTHING = np.zeros(0, np.int64)
AT_ONCE = 1 << 22
"""Numbers that are edited at once, unless a layer alone has more: their indices take memory."""


def _spans(counts: Sequence[int]) -> Iterator[list[int]]:
    """Layers with numbers to edit, in runs of at most `AT_ONCE` numbers."""
    held: list[int] = []
    for layer, count in enumerate(counts):
        if held and sum(counts[one] for one in held) + count > AT_ONCE:
            yield held
            held = []
        held += [layer] if count else []
    if held:
        yield held


def _edited(
    config: ModelConfig, rule: Rule, stack: jax.Array, chosen: Mapping[int, list[np.ndarray]], edit: Edit, write: Callable[..., jax.Array]
) -> jax.Array:
    """A parameter with the chosen numbers of some layers edited; `chosen`: layer -> flat indices into each of its tensors."""
    firsts, place = _places(config, rule)
    found = [(layer, place[first + at]) for layer, each in chosen.items() for first, at in zip(firsts, each, strict=True)]
    flat, count = np.concatenate([at for _, at in found]), sum(len(at) for _, at in found)
    number = np.concatenate([np.full(len(at), layer, np.int32) for layer, at in found])
    rest = (0, (1 << (count - 1).bit_length()) - count)  # few sizes, few compilations
    where = [np.pad(axis.astype(np.int32), rest, mode="edge") for axis in (number, *np.unravel_index(flat, stack.shape[1:]))]
    sharding = stack.sharding
    if not isinstance(sharding, jax.NamedSharding):
        sharding = jax.NamedSharding(jax.sharding.Mesh([next(iter(stack.devices()))], ("data",)), jax.P())
    values = np.array(_read(stack, where, sharding))[:count]
    parts = np.split(values, np.cumsum([len(at) for _, at in found])[:-1])
    edited = np.concatenate([edit(part) if len(part) else part for part in parts])
    return write(stack, where, np.pad(edited, rest, mode="edge"), sharding)


@lru_cache(maxsize=4)
def _places(config: ModelConfig, rule: Rule) -> tuple[list[int], np.ndarray]:
    """(first number of every tensor when those of a layer are counted through, number -> flat index in the layer's parameter)."""
    tensors = list(layer_tensors(rule, config, 0))
    sizes = [math.prod(shape) for _, shape in tensors]
    firsts = [sum(sizes[:at]) for at in range(len(sizes))]
    numbers = {
        name: np.arange(first, first + size, dtype=np.int32 if sum(sizes) < 2**31 else np.int64).reshape(shape)
        for (name, shape), first, size in zip(tensors, firsts, sizes, strict=True)
    }
    joined = join_layer(rule, config, 0, numbers).ravel()
    place = np.empty_like(joined)
    place[joined] = np.arange(joined.size, dtype=joined.dtype)
    return firsts, place


@partial(jax.jit, static_argnames=("sharding",))
def _read(stack: jax.Array, where: Sequence[jax.Array], sharding: jax.NamedSharding) -> jax.Array:
    """The numbers of a parameter at int [n] per axis, on every device."""

    def own(stack: jax.Array, where: Sequence[jax.Array]) -> jax.Array:
        found = stack.at[_local(stack, where, sharding)].get(mode="fill", fill_value=0)
        axes = tuple(name for names in sharding.spec if names for name in ((names,) if isinstance(names, str) else names))
        return jax.lax.psum(found, axes) if axes else found

    return jax.shard_map(own, mesh=sharding.mesh, in_specs=(sharding.spec, jax.P()), out_specs=jax.P(), check_vma=False)(stack, where)


def _put(stack: jax.Array, where: Sequence[jax.Array], values: jax.Array, sharding: jax.NamedSharding) -> jax.Array:
    """A copy of a parameter with numbers [n] put in at int [n] per axis."""

    def own(stack: jax.Array, where: Sequence[jax.Array], values: jax.Array) -> jax.Array:
        return stack.at[_local(stack, where, sharding)].set(values, mode="drop")

    specs = (sharding.spec, jax.P(), jax.P())
    return jax.shard_map(own, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)(stack, where, values)


_write = jax.jit(_put, static_argnames=("sharding",))
_write_on = jax.jit(_put, static_argnames=("sharding",), donate_argnums=0)


def _local(part: jax.Array, where: Sequence[jax.Array], sharding: jax.NamedSharding) -> tuple[jax.Array, ...]:
    """Indices into this device's part of a parameter; past its end for numbers that another device holds."""
    found = []
    for axis, names in enumerate([*sharding.spec, *[None] * (part.ndim - len(sharding.spec))]):
        at = where[axis] - (jax.lax.axis_index(names) * part.shape[axis] if names else 0)
        found.append(jnp.where((at >= 0) & (at < part.shape[axis]), at, part.shape[axis]))
    return tuple(found)
