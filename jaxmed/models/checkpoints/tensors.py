"""The tensors of a checkpoint: which ones a family's rules read for a config, under which names and in which shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxmed.errors import UserError, all_problems
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.config import ModelConfig
from jaxmed.models.families.table import Family, Rule, Source
from jaxmed.models.params import MATRICES, param_letters


def letters_of(rule: Rule, config: ModelConfig) -> str | None:
    """Letters of a rule's parameter, the layer axis included; None where the config has no such parameter."""
    found: Any = param_letters(config)
    for key in rule.path:
        if key not in found:
            return None
        found = found[key]
    return found


def needed_rules(family: Family, config: ModelConfig) -> list[Rule]:
    """The rules of the parameters that `config` has."""
    return [rule for rule in family.rules if letters_of(rule, config) is not None]


def is_stacked(rule: Rule) -> bool:
    return rule.path[0] == "blocks"


def axis_terms(axis: str, sizes: dict[str, int]) -> list[tuple[int, str]]:
    """Length and letters of every term of a source axis ("NH+KH+KH" has three)."""
    return [(math.prod(sizes[letter] for letter in term), term) for term in axis.split("+")]


def source_shape(source: Source, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sum(length for length, _ in axis_terms(axis, sizes)) for axis in source.shape)


def expected_tensors(rule: Rule, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a rule reads."""
    for layer in range(config.layers) if is_stacked(rule) else (0,):
        yield from layer_tensors(rule, config, layer)


def layer_tensors(rule: Rule, config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a rule reads for one layer."""
    sizes = config.sizes
    for source in rule.sources:
        for expert in range(sizes["X"]) if "{e}" in source.name else (0,):
            yield source.name.format(l=layer, e=expert), source_shape(source, sizes)


def split_layer(rule: Rule, config: ModelConfig, layer: int, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every tensor that a rule reads for one layer, from the layer's parameter."""
    parts = rule.layout.split(config.sizes, array)
    each = (one for source, part in zip(rule.sources, parts, strict=True) for one in (part if "{e}" in source.name else (part,)))
    names = (name for name, _ in layer_tensors(rule, config, layer))
    return zip(names, each, strict=True)


def join_layer(rule: Rule, config: ModelConfig, layer: int, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A layer's parameter from its tensors by name."""
    found = []
    for source in rule.sources:
        named = source.name.replace("{l}", str(layer))
        held = [tensors[named.format(e=e)] for e in range(config.sizes["X"])] if "{e}" in named else tensors[named]
        found.append(np.stack(held) if isinstance(held, list) else held)
    return rule.layout.join(config.sizes, *found)


def matrix_rules(family: Family) -> list[Rule]:
    """The rules of the blocks' matrices."""
    return [rule for rule in family.rules if is_stacked(rule) and rule.path[-1] in MATRICES]


def under_full_names(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint with the prefix that some leave out of their names put back."""
    begins = family.begins
    if any(name.startswith(begins) for name in checkpoint.shapes):
        return checkpoint
    full = {name if name == "lm_head.weight" else begins + name: name for name in checkpoint.shapes}
    shapes = {new: checkpoint.shapes[old] for new, old in full.items()}
    unreadable = {new: checkpoint.unreadable[old] for new, old in full.items() if old in checkpoint.unreadable}
    read = lambda name, cut=None: checkpoint.read(full[name], cut)  # noqa: E731
    return replace(checkpoint, shapes=shapes, read=read, unreadable=unreadable)


HEAD = "lm_head.weight"


def stored_head(checkpoint: Checkpoint, family: Family, config: ModelConfig) -> ModelConfig:
    """The config, untied where a head is stored that is not the embedding it is said to be: it is used, as `transformers` uses it."""
    checkpoint = under_full_names(checkpoint, family)
    embedding = next(rule.sources[0].name for rule in family.rules if rule.path == ("embedding",))
    shapes = checkpoint.shapes
    if not (config.tied and checkpoint.files) or HEAD not in shapes or embedding not in shapes:
        return config
    if shapes[HEAD] == shapes[embedding] and HEAD not in checkpoint.unreadable and embedding not in checkpoint.unreadable:
        rows = range(0, shapes[HEAD][0], ROWS_COMPARED)
        cuts = ((slice(at, min(at + ROWS_COMPARED, shapes[HEAD][0])), *(slice(None),) * (len(shapes[HEAD]) - 1)) for at in rows)
        if all(np.array_equal(checkpoint.read(HEAD, cut), checkpoint.read(embedding, cut)) for cut in cuts):
            return config
    return replace(config, tied=False)


ROWS_COMPARED = 2**12


def check_tensors(checkpoint: Checkpoint, family: Family, rules: list[Rule], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `rules` read; a UserError where the checkpoint's tensors are not these."""
    if config.layers * config.sizes["X"] > 4 * len(checkpoint.shapes):
        raise UserError(f"The config says {config.layers} layers; the checkpoint holds {len(checkpoint.shapes)} tensors in all.")
    expected = dict(pair for rule in rules for pair in expected_tensors(rule, config))
    ignored = {name.format(l=layer) for name in family.ignored for layer in range(config.layers)}
    if config.tied:
        ignored.add("lm_head.weight")
    problems = [f"missing tensor {name} {list(shape)}" for name, shape in expected.items() if name not in checkpoint.shapes]
    problems += [
        f"tensor {name} has shape {list(found)}, the config says {list(expected[name])}"
        for name, found in checkpoint.shapes.items()
        if name in expected and found != expected[name]
    ]
    problems += [f"tensor {name} {why}" for name, why in checkpoint.unreadable.items() if name in expected]
    problems += [f"unknown tensor {name}" for name in checkpoint.shapes if name not in expected and name not in ignored]
    if problems:
        raise all_problems(f"Checkpoint {checkpoint.files[0]}", problems, "Check that config and weights belong together.")
    return expected
