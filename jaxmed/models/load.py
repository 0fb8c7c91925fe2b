"""A checkpoint into a `Model`: parameters checked, stacked by layer, and placed on their devices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxmed.distributed import keep_compiled_programs, make_mesh
from jaxmed.errors import UserError, unknown
from jaxmed.models.catalog import cache_folder, digest, locate
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.checkpoints.assemble import read_params
from jaxmed.models.checkpoints.gguf_file import open_gguf
from jaxmed.models.checkpoints.huggingface import open_folder
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import read_config
from jaxmed.models.families.table import Family
from jaxmed.models.transformer import Params

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


def from_params(config: ModelConfig, params: Params, mesh: jax.sharding.Mesh, name: str = "in-memory", tokenizer: Any = None) -> Model:
    """A `Model` around parameters made in memory."""
    if not isinstance(params, dict) or "blocks" not in params:
        raise UserError("Parameters are a nested dict with an entry 'blocks'.")
    return Model(config, params, tokenizer, mesh, name)
