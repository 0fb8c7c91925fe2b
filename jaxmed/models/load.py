"""A checkpoint into a `Model`: parameters checked, stacked by layer, and placed on their devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxmed.distributed import check_mesh, keep_compiled_programs, make_mesh
from jaxmed.errors import UserError, unknown
from jaxmed.models.catalog import cache_folder, locate
from jaxmed.models.checkpoints import Checkpoint, decoded
from jaxmed.models.checkpoints.assemble import check_shapes, read_params
from jaxmed.models.checkpoints.edit_record import RECORD, read_edits
from jaxmed.models.checkpoints.gguf_file import open_gguf
from jaxmed.models.checkpoints.huggingface import GENERATION, SIDE_FILES, check_regular, open_folder, read_json, read_tokenizer
from jaxmed.models.checkpoints.lora import with_adapter
from jaxmed.models.checkpoints.orbax_store import is_store, open_store
from jaxmed.models.checkpoints.tensors import stored_head
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import read_config
from jaxmed.models.families.table import Family
from jaxmed.models.families.wrappers import unwrapped
from jaxmed.models.fetch import hub_shapes, is_hub_name
from jaxmed.models.model import Later, Model
from jaxmed.models.params import Params, check_split

DTYPES = ("float32", "bfloat16")


def load(
    name_or_path: str,
    dtype: str | None = "float32",
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    int8: bool = False,
    template_from: str | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """Loads a model: a known name, a local folder, a .gguf file, a Hugging Face name, or what `jaxmed convert --to orbax` wrote.

    Args:
        name_or_path: see `jaxmed models` for the known names.
        dtype: "float32" or "bfloat16", for weights and matmuls. The residual stream and the outcomes are float32 in both.
            None: what the checkpoint's config names, float32 where it names none or another.
        revision: branch, tag or commit on the hub, such as a training stage.
        mesh: device mesh with axes "data", "fsdp" and "tensor"; by default all local devices on "data".
        int8: keep the blocks' matrices as int8 with one scale per output channel, for models that do not fit otherwise.
        template_from: a model whose chat template is used, for base models that have none.
        adapter: a LoRA adapter, as the folder that PEFT saves; it is merged into the weights as they are read.

    Raises:
        UserError: unknown name, no network, or a checkpoint with any problem (all are listed together).
    """
    keep_compiled_programs(cache_folder() / "compiled")
    model, checkpoint, family = _open(name_or_path, dtype, revision, mesh, int8, adapter)
    restore = checkpoint.restore or partial(read_params, checkpoint, family)
    kept = _is_decoded(model.source, int8, adapter)
    model.tokenizer = _tokenizer(checkpoint, model.config.dtype, kept)
    try:
        model.params = restore(model.config, model.mesh)
    except decoded.Damage:  # found before anything was computed with it
        decoded.drop(checkpoint.files[0], model.config.dtype)
        return load(name_or_path, dtype, revision, mesh, int8, template_from, adapter)
    if checkpoint.restore is None and kept:
        decoded.keep(checkpoint.files[0], checkpoint, model.config, model.params)
    if template_from is not None:
        model.tokenizer = _with_template(model.tokenizer, template_from, name_or_path)
    return model.describe_params()


def describe(
    name_or_path: str,
    dtype: str | None = "float32",
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    int8: bool = False,
    template_from: str | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """A model's config and tokenizer, with empty parameters: enough to check and plan a sweep. Takes and raises what `load` does."""
    model, checkpoint, family = _open(name_or_path, dtype, revision, mesh, int8, adapter, weights=False)
    if checkpoint.restore is None and model.files:
        check_shapes(checkpoint, family, model.config)
    model.tokenizer = _tokenizer(checkpoint, model.config.dtype, _is_decoded(model.source, int8, adapter))
    if template_from is not None:
        model.tokenizer = _with_template(model.tokenizer, template_from, name_or_path)
    return model


def _tokenizer(checkpoint: Checkpoint, dtype: str, kept: bool) -> Any:
    """The tokenizer; of weights that are kept decoded one that is built when it is asked for: that takes longer than to map the weights."""
    if not kept:
        return checkpoint.tokenizer()
    return Later(partial(decoded.tokenizer, checkpoint.files[0], dtype, checkpoint.tokenizer))


def _open(
    name: str,
    dtype: str | None,
    revision: str | None,
    mesh: jax.sharding.Mesh | None,
    int8: bool = False,
    adapter: str | Path | None = None,
    weights: bool = True,
) -> tuple[Model, Checkpoint, Family]:
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    mesh = mesh or make_mesh()
    check_mesh(mesh)
    path = locate(name, revision, weights)
    held = decoded.find(path, dtype or "float32") if _is_decoded(path, int8, adapter) else None  # GGUF files name no dtype
    light = not weights and is_hub_name(name) and not any(path.glob("*.safetensors"))
    checkpoint = held or (_without_weights(path, name, revision) if light else _open_path(path))
    family, config = read_config(checkpoint.config)
    config = replace(config, dtype=dtype or _named_dtype(checkpoint.config), int8=int8)
    check_split(config, mesh)
    edits = read_edits(path)
    config = stored_head(checkpoint, family, config)
    if adapter is not None:
        checkpoint, edit = with_adapter(checkpoint, Path(adapter), family, config)
        edits = (*edits, edit)
    generation = read_json(path / GENERATION) if (path / GENERATION).is_file() else None
    model = Model(config, {}, None, mesh, name, revision, checkpoint.files, path, checkpoint.config, edits, generation)
    return model, checkpoint, family


def _without_weights(folder: Path, name: str, revision: str | None) -> Checkpoint:
    """A repository of the hub whose weights are not here: what they are called comes from their headers."""

    def read(tensor: str, cut: Any = None) -> Any:
        raise UserError(f"The weights of {name!r} are not fetched yet, {tensor} among them.")

    shapes = hub_shapes(name, revision)
    unread = dict.fromkeys(shapes, "is not fetched")
    return unwrapped(Checkpoint(read_json(folder / "config.json"), shapes, read, (), lambda: read_tokenizer(folder), unreadable=unread))


def _is_decoded(path: Path | None, int8: bool, adapter: str | Path | None) -> bool:
    """Whether the weights are decoded as they are read, into nothing but themselves."""
    return path is not None and path.is_file() and not int8 and adapter is None


def _named_dtype(raw: Mapping[str, Any]) -> str:
    named = raw.get("dtype") or raw.get("torch_dtype")
    return named if named in DTYPES else "float32"


def _open_path(path: Path) -> Checkpoint:
    if path.is_file():
        return open_gguf(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a model folder nor a file (a pipe or device?).")
    check_regular(path, (*SIDE_FILES, RECORD))
    return open_store(path) if is_store(path) else unwrapped(open_folder(path))


def _with_template(tokenizer: Any, template_from: str, name: str) -> Any:
    if tokenizer is None:
        raise UserError(f"{name!r} has no tokenizer files, so it cannot take the chat template of {template_from!r}.")
    path = locate(template_from)
    other = _open_path(path).tokenizer()
    if getattr(other, "chat_template", None) is None:
        raise UserError(f"{template_from!r} has no chat template to take.")
    tokenizer.chat_template = other.chat_template
    return tokenizer


def from_params(config: ModelConfig, params: Params, mesh: jax.sharding.Mesh, name: str = "in-memory", tokenizer: Any = None) -> Model:
    """A `Model` around parameters made in memory."""
    if not isinstance(params, dict) or "blocks" not in params:
        raise UserError("Parameters are a nested dict with an entry 'blocks'.")
    return Model(config, params, tokenizer, mesh, name)
