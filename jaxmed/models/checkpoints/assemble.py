"""Checkpoint tensors -> parameters, through a family's name table: checked first, then read layer by layer, each device its own slice."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import MESH_AXES, partition
from jaxmed.errors import UserError, all_problems
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.checkpoints.tensors import axis_terms, check_tensors, is_stacked, letters_of, needed_rules, under_full_names
from jaxmed.models.config import ModelConfig
from jaxmed.models.families.table import Family, Rule, Source
from jaxmed.models.params import MATRICES, Params, param_dtype, param_shapes

Part = tuple[tuple[tuple[str, ...], int, int], ...]
"""What a device holds of a parameter: (mesh axes, number, count), for those mesh axes that split it. Letters on the same mesh axes are cut
alike: the heads of queries and of keys."""
WHOLE: Part = ()


def read_params(checkpoint: Checkpoint, family: Family, config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """Every parameter of `config` on its devices. Host memory beyond the parameters: one layer of one parameter.

    Raises:
        UserError: tensors that are missing, left over, of a wrong shape, or hold values that are not finite.
    """
    rules, checkpoint = needed_rules(family, config), check_shapes(checkpoint, family, config)
    _check_memory(config, mesh)
    params: Params = {"blocks": {}}
    problems: list[str] = []
    for rule in rules:
        target = params
        for key in rule.path[:-1]:
            target = target[key]
        if config.int8 and rule.path[-1] in MATRICES:
            target |= _place_int8(checkpoint, rule, config, mesh, problems)
        else:
            target[rule.path[-1]] = _place(checkpoint, rule, config, mesh, problems)
    if problems:
        raise all_problems("Checkpoint", problems, "The weights are damaged.")
    return params


def check_shapes(checkpoint: Checkpoint, family: Family, config: ModelConfig) -> Checkpoint:
    """The checkpoint with its tensors under their full names; reads headers alone.

    Raises:
        UserError: tensors that are missing, left over, or of another shape than the config says.
    """
    checkpoint = under_full_names(checkpoint, family)
    check_tensors(checkpoint, family, needed_rules(family, config), config)
    return checkpoint


def _check_memory(config: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises a UserError where the weights that this host's CPU devices share exceed its memory."""
    if mesh.devices.flat[0].platform != "cpu":
        return
    size = sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in jax.tree.leaves(param_shapes(config)))
    if size > host_memory():
        raise UserError(
            f"The weights take {size / 1e9:,.1f} GB in {config.dtype}; this machine has {host_memory() / 1e9:,.1f} GB of memory. "
            "Load them as bfloat16 or int8, or on a larger machine."
        )


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63


def _place(checkpoint: Checkpoint, rule: Rule, config: ModelConfig, mesh: jax.sharding.Mesh, problems: list[str]) -> jax.Array:
    """One parameter on its devices, each of which reads no more than its own slice."""
    letters, dtype, stacked = letters_of(rule, config) or "", param_dtype(config, rule.path[-1]), is_stacked(rule)
    one = letters[1:] if stacked else letters
    shape = tuple(config.sizes[letter] for letter in one)
    sharding = partition(one, shape, mesh)
    part_of = partial(_part, one, shape)
    cuts = {part_of(index): index for index in sharding.addressable_devices_indices_map(shape).values() if index is not None}
    sizes = {part: tuple(len(range(size)[cut]) for cut, size in zip(index, shape, strict=True)) for part, index in cuts.items()}

    def build(layer: int, into: Mapping[Part, np.ndarray]) -> Mapping[Part, np.ndarray]:
        for part, held in into.items():
            held[...] = _build(checkpoint, rule, config, layer, part, problems)
        return into

    def place(held: Mapping[Part, np.ndarray], sharding: jax.NamedSharding, layers: tuple[int, ...]) -> jax.Array:
        own = lambda index: held[part_of(index[len(layers) :])]  # noqa: E731
        return jax.make_array_from_callback((*layers, *shape), sharding, own)

    if not stacked:
        return place(build(0, {part: empty(size, dtype) for part, size in sizes.items()}), sharding, ())
    layers = range(config.layers)
    if mesh.devices.flat[0].platform == "cpu":  # what lies on the host is used there
        stacks = {part: empty((config.layers, *size), dtype) for part, size in sizes.items()}
        for _ in in_threads(lambda layer: build(layer, {part: held[layer] for part, held in stacks.items()}), layers):
            pass
        return place(stacks, partition(letters, (config.layers, *shape), mesh), (config.layers,))
    stack = _empty(letters, config, dtype, mesh)
    rows = in_threads(lambda layer: build(layer, {part: empty(size, dtype) for part, size in sizes.items()}), layers)
    for layer, row in enumerate(rows):
        stack = set_layer(stack, place(row, sharding, ()), layer)
    return stack


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins on a cache line, as JAX wants those that it uses where they lie."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + LINE, np.uint8)
    first = -raw.ctypes.data % LINE
    return raw[first : first + size].view(dtype).reshape(shape)


LINE = 64


def in_threads(work: Callable[[int], Any], items: Iterable[int]) -> Iterator[Any]:
    """Results in order, worked on by as many threads as there are cores, no more than two apiece ahead of what is taken."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > 2 * count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for one in ahead:
                one.cancel()


def _place_int8(checkpoint: Checkpoint, rule: Rule, config: ModelConfig, mesh: jax.sharding.Mesh, problems: list[str]) -> Params:
    """A matrix as int8 and its scales, one per output channel: largest magnitude / 127. Every host reads whole layers."""
    name, letters = rule.path[-1], letters_of(rule, config) or ""
    names = {name: letters, name + "_scale": "L" + letters[1 + MATRICES[name] :]}
    stacks = {each: _empty(axes, config, param_dtype(config, each), mesh) for each, axes in names.items()}

    def quantise(layer: int) -> dict[str, np.ndarray]:
        matrix = _build(checkpoint, rule, config, layer, WHOLE, problems).astype(np.float32)
        scale = np.abs(matrix).max(tuple(range(MATRICES[name])), initial=1e-30) / 127
        return {name: np.rint(matrix / scale).astype(np.int8), name + "_scale": scale}

    for layer, found in enumerate(in_threads(quantise, range(config.layers))):
        for each, array in found.items():
            row = jax.device_put(array, partition(names[each][1:], array.shape, mesh))
            stacks[each] = set_layer(stacks[each], row, layer)
    return stacks


def _empty(letters: str, config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh) -> jax.Array:
    shape = tuple(config.sizes[letter] for letter in letters)
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=partition(letters, shape, mesh))()


@partial(jax.jit, donate_argnums=0)
def set_layer(stack: jax.Array, row: jax.Array, layer: Any) -> jax.Array:
    """`stack` with one layer put in; `stack` itself is given up."""
    return jax.lax.dynamic_update_index_in_dim(stack, row, layer, 0)


def _part(letters: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> Part:
    """Which part of a parameter an index asks for."""
    found = []
    for letter, cut, size in zip(letters, index, shape, strict=True):
        start, stop, _ = cut.indices(size)
        if stop - start < size:
            found.append((MESH_AXES[letter], start // (stop - start), size // (stop - start)))
    return tuple(found)


def _share(letters: str, part: Part) -> tuple[int, int]:
    """(number, count) of the share that a part has of axes with these letters."""
    return next(((number, count) for axes, number, count in part if any(MESH_AXES.get(letter) == axes for letter in letters)), (0, 1))


def _build(checkpoint: Checkpoint, rule: Rule, config: ModelConfig, layer: int, part: Part, problems: list[str]) -> np.ndarray:
    """One layer of a parameter, or one device's share of it, from its tensors."""
    sizes = config.sizes
    local = {letter: size // _share(letter, part)[1] for letter, size in sizes.items()}
    tensors = []
    for source in rule.sources:
        name = source.name.replace("{l}", str(layer))
        if "{e}" in name:
            first = _share("X", part)[0] * local["X"]
            experts, inner = range(first, first + local["X"]), tuple(one for one in part if one[0] != MESH_AXES["X"])
            tensors.append(np.stack([_read(checkpoint, name.format(e=e), source, sizes, inner, problems) for e in experts]))
        else:
            tensors.append(_read(checkpoint, name, source, sizes, part, problems))
    return rule.layout.join(local, *tensors)


def _read(checkpoint: Checkpoint, name: str, source: Source, sizes: dict[str, int], part: Part, problems: list[str]) -> np.ndarray:
    """A tensor, or the rows and columns of it that belong to a part."""
    if part == WHOLE:
        tensor = checkpoint.read(name, None)
    else:
        tensor = _read_cut(checkpoint, name, [_ranges(axis, sizes, part) for axis in source.shape])
    with np.errstate(all="ignore"):
        tensor = tensor.astype(np.float32) if tensor.dtype == np.float64 else tensor
        if not np.isfinite(tensor.sum(dtype=np.float64)):
            problems.append(f"{name} holds values that are not finite")
    return tensor


def _ranges(axis: str, sizes: dict[str, int], part: Part) -> list[slice]:
    found, start = [], 0
    for length, letters in axis_terms(axis, sizes):
        number, count = _share(letters, part)
        piece = length // count
        found.append(slice(start + number * piece, start + (number + 1) * piece))
        start += length
    return found


def _read_cut(checkpoint: Checkpoint, name: str, ranges: list[list[slice]]) -> np.ndarray:
    """The ranges of every axis, those of an axis put one after the other."""
    several = next((axis for axis, found in enumerate(ranges) if len(found) > 1), 0)
    cuts = [tuple(cut if axis == several else found[0] for axis, found in enumerate(ranges)) for cut in ranges[several]]
    pieces = [checkpoint.read(name, cut) for cut in cuts]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=several)
