"""A checkpoint into a `Model`: parameters checked, stacked by layer, and placed on their devices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.distributed import keep_compiled_programs, make_mesh
from jaxmed.errors import UserError, all_problems, unknown
from jaxmed.models.catalog import cache_folder, digest, locate
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.checkpoints.gguf_file import open_gguf
from jaxmed.models.checkpoints.huggingface import open_folder
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import Family, Rule, read_config
from jaxmed.models.transformer import Params, param_letters, param_shardings

DTYPES = ("float32", "bfloat16")


@dataclass
class Model:
    """A loaded model.

    Attributes:
        config: shape and arithmetic.
        params: nested dict of arrays; blocks are stacked on a leading layer axis.
        tokenizer: a transformers tokenizer, or None where the checkpoint has none.
        mesh: the device mesh the parameters live on, axes "data" and "model".
        name, revision: as asked for.
        files: the weight files.
    """

    config: ModelConfig
    params: Params
    tokenizer: Any
    mesh: jax.sharding.Mesh
    name: str
    revision: str | None = None
    files: tuple[Path, ...] = ()

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over the weight files (over the digests, where there are several); "none" for a model made in memory."""
        digests = [digest(file) for file in self.files]
        if len(digests) < 2:
            return digests[0] if digests else "none"
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def load(name_or_path: str, dtype: str = "float32", revision: str | None = None, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a model: a known name, a local folder, a .gguf file, or a Hugging Face name.

    Args:
        name_or_path: see `jaxmed models` for the known names.
        dtype: "float32" or "bfloat16", for weights and matmuls. The residual stream and the outcomes are float32 in both.
        revision: branch, tag or commit on the hub.
        mesh: device mesh with axes "data" and "model"; by default all local devices on "data".

    Raises:
        UserError: unknown name, no network, or a checkpoint with any problem (all are listed together).
    """
    keep_compiled_programs(cache_folder() / "compiled")
    model, checkpoint, family = _open(name_or_path, dtype, revision, mesh)
    model.params = read_params(checkpoint, family, model.config, model.mesh)
    return model


def describe(name_or_path: str, dtype: str = "float32", revision: str | None = None, mesh: jax.sharding.Mesh | None = None) -> Model:
    """A model's config and tokenizer, with empty parameters: enough to check and plan a sweep. Raises what `load` raises."""
    return _open(name_or_path, dtype, revision, mesh)[0]


def _open(name: str, dtype: str, revision: str | None, mesh: jax.sharding.Mesh | None) -> tuple[Model, Checkpoint, Family]:
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    mesh = mesh or make_mesh()
    path = locate(name, revision)
    checkpoint = open_gguf(path) if path.is_file() else open_folder(path)
    family, config = read_config(checkpoint.config)
    config = replace(config, dtype=dtype)
    return Model(config, {}, checkpoint.tokenizer(), mesh, name, revision, checkpoint.files), checkpoint, family


def read_params(checkpoint: Checkpoint, family: Family, config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """Every parameter of `config` from the checkpoint, through the family's name table.

    Raises:
        UserError: tensors that are missing, left over, of a wrong shape, or hold values that are not finite.
    """
    rules = [rule for rule in family.rules if rule.needed(config) and _declared(rule, config)]
    _check_tensors(checkpoint, family, rules, config)
    shardings = param_shardings(config, mesh)
    params: Params = {"blocks": {}}
    problems: list[str] = []
    for rule in rules:
        array = _build(checkpoint, rule, config, problems)
        target, sharding = params, shardings
        for key in rule.path[:-1]:
            target, sharding = target[key], sharding[key]
        target[rule.path[-1]] = jax.device_put(array, sharding[rule.path[-1]])
    if problems:
        raise all_problems("Checkpoint", problems, "The weights are damaged.")
    return params


def _declared(rule: Rule, config: ModelConfig) -> bool:
    letters = param_letters(config)
    for key in rule.path:
        if key not in letters:
            return False
        letters = letters[key]
    return True


def _names(rule: Rule, config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor a rule reads, with the shape it must have."""
    sizes = config.sizes
    layers = range(config.layers) if rule.path[0] == "blocks" else range(1)
    shape = lambda source: tuple(int(np.prod([sizes[letter] for letter in axis])) for axis in source.shape)  # noqa: E731
    return [(source.name.format(l=layer), shape(source)) for layer in layers for source in rule.sources]


def _check_tensors(checkpoint: Checkpoint, family: Family, rules: list[Rule], config: ModelConfig) -> None:
    expected = dict(pair for rule in rules for pair in _names(rule, config))
    ignored = {name.format(l=layer) for name in family.ignored for layer in range(config.layers)}
    if config.tied:
        ignored.add("lm_head.weight")
    problems = [f"missing tensor {name} {list(shape)}" for name, shape in expected.items() if name not in checkpoint.shapes]
    problems += [
        f"tensor {name} has shape {list(found)}, the config says {list(expected[name])}"
        for name, found in checkpoint.shapes.items()
        if name in expected and found != expected[name]
    ]
    problems += [f"unknown tensor {name}" for name in checkpoint.shapes if name not in expected and name not in ignored]
    if problems:
        raise all_problems(f"Checkpoint {checkpoint.files[0]}", problems, "Check that config and weights belong together.")


def _build(checkpoint: Checkpoint, rule: Rule, config: ModelConfig, problems: list[str]) -> np.ndarray:
    sizes, dtype = config.sizes, np.dtype(config.compute)
    stacked = rule.path[0] == "blocks"
    layers: list[np.ndarray] | np.ndarray = []
    for layer in range(config.layers if stacked else 1):
        sources = [checkpoint.read(source.name.format(l=layer)) for source in rule.sources]
        built = rule.build(sizes, *sources).astype(dtype)
        if not np.isfinite(built.astype(np.float32).sum(dtype=np.float64)):
            problems.append(f"{rule.sources[0].name.format(l=layer)} holds values that are not finite")
        if not stacked:
            return np.ascontiguousarray(built)
        if layer == 0:
            layers = np.empty((config.layers, *built.shape), dtype)
        layers[layer] = built
    return np.asarray(layers)


def from_params(config: ModelConfig, params: Params, mesh: jax.sharding.Mesh, name: str = "in-memory", tokenizer: Any = None) -> Model:
    """A `Model` around parameters made in memory."""
    if not isinstance(params, dict) or "blocks" not in params:
        raise UserError("Parameters are a nested dict with an entry 'blocks'.")
    return Model(config, params, tokenizer, mesh, name)
