"""Which unit every weight of the blocks' matrices belongs to, by the names and in the layout of the Hugging Face checkpoint.

A neuron has its rows of the gate and up projections and its column of the down projection; a head its rows of the query projection and
its columns of the output projection. The rows of keys and values belong to a group of heads, to each in equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxmed.models.checkpoints.tensors import layer_tensors, matrix_rules, split_layer
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import FAMILIES
from jaxmed.models.params import block_letters

KINDS = {"gate_up": "neuron", "down": "neuron", "qkv": "head_out", "out": "head_out"}
"""Parameter of a block -> the mediator that its weights belong to."""


@dataclass(frozen=True)
class Owned:
    """A matrix.

    Attributes:
        path: the block's parameter that it is, or is part of.
        layer, kind: of the units, a key of `MEDIATORS`.
        owner: int32, one per weight, flat in the checkpoint's layout: a neuron or head; from the number of heads on, a group of heads.
    """

    name: str
    path: str
    layer: int
    kind: str
    owner: np.ndarray


def unit_count(config: ModelConfig, kind: str) -> int:
    """How many units of a kind a layer has."""
    return config.neurons if kind == "neuron" else config.heads


def slot_count(config: ModelConfig, kind: str) -> int:
    """How many owners there are: units, and behind the heads their groups."""
    return config.neurons if kind == "neuron" else config.heads + config.kv_heads


def by_unit(config: ModelConfig, kind: str, slots: np.ndarray) -> np.ndarray:
    """Sums over owners [..., slots] as sums over units [..., units]: what a group of heads has goes to each of its heads in equal parts."""
    if kind == "neuron":
        return slots
    group = config.heads // config.kv_heads
    return slots[..., : config.heads] + np.repeat(slots[..., config.heads :], group, axis=-1) / group


def owned_matrices(config: ModelConfig, layers: dict[str, tuple[int, ...]]) -> Iterator[Owned]:
    """The matrices of some layers, layer by layer of each parameter.

    Args:
        layers: kind -> the layers whose matrices are wanted.
    """
    for rule in matrix_rules(FAMILIES[config.family]):
        kind = KINDS[rule.path[-1]]
        if not layers.get(kind):
            continue
        flat = [array.ravel() for _, array in split_layer(rule, config, 0, _owners(config, rule.path[-1]))]
        for layer in layers[kind]:
            for (name, _), owner in zip(layer_tensors(rule, config, layer), flat, strict=True):
                yield Owned(name, rule.path[-1], layer, kind, owner)


def _owners(config: ModelConfig, path: str) -> np.ndarray:
    """The owner of every weight of a block's parameter, in its own layout."""
    letters, sizes = block_letters(config)[path], config.sizes
    shape = tuple(sizes[letter] for letter in letters)
    if path == "qkv":
        group, number = sizes["G"], np.arange(sizes["K"])[:, None]
        within = np.arange(group + 2)
        found = np.where(within < group, number * group + within, sizes["N"] + number)[None, :, :, None]
    elif letters == "DXCM":
        found = np.arange(sizes["F"]).reshape(1, sizes["X"], 1, sizes["M"])
    else:
        unit = "N" if path == "out" else "F"
        found = np.arange(sizes[unit]).reshape([sizes[letter] if letter == unit else 1 for letter in letters])
    return np.broadcast_to(found, shape).astype(np.int32)
