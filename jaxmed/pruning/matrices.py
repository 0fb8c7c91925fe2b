"""The matrices that are scored and pruned, under the names and in the shapes of the Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models.checkpoints.assemble import join_layer, layer_tensors, matrix_rules, set_layer, split_layer
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import FAMILIES
from jaxmed.models.families.table import Rule
from jaxmed.models.load import Model
from jaxmed.models.transformer import Params


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


def weights_by_name(model: Model) -> dict[str, np.ndarray]:
    """The same, all on the host."""
    return dict(named_weights(model))


def with_matrices(config: ModelConfig, params: Params, changed: Mapping[str, np.ndarray]) -> Params:
    """Parameters with some matrices, by name, put in the place of their own; all other numbers keep their bits."""
    blocks = dict(params["blocks"])
    for rule in matrix_rules(FAMILIES[config.family]):
        name = rule.path[-1]
        layers = [number for number in range(config.layers) if any(one in changed for one, _ in layer_tensors(rule, config, number))]
        if layers:
            blocks[name] = jax.tree.map(jnp.copy, blocks[name])
        for number in layers:
            row = _joined(rule, config, number, blocks[name][number], changed)
            blocks[name] = set_layer(blocks[name], row, number)
    return {**params, "blocks": blocks}


def _joined(rule: Rule, config: ModelConfig, layer: int, held: jax.Array, changed: Mapping[str, np.ndarray]) -> np.ndarray:
    tensors = dict(split_layer(rule, config, layer, np.asarray(held)))
    return join_layer(rule, config, layer, {**tensors, **{name: changed[name] for name in tensors if name in changed}})
