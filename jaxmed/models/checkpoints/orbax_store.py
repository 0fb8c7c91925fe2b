"""Our own sharded checkpoint: the parameters as Orbax keeps them, which any mesh can restore, and what is needed to use them.

FOLDER/params is Orbax's; FOLDER/jaxmed.json holds the config, where the weights came from, and the size of every file; digests
of them, and the tokenizer's files, lie beside it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError, all_problems, unknown
from jaxmed.files import check_sums, write_sums
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.checkpoints.edit_record import refuse_attacks
from jaxmed.models.checkpoints.export import check_writable, write_side_files
from jaxmed.models.checkpoints.huggingface import read_json, read_tokenizer
from jaxmed.models.checkpoints.new_folder import check_vacant, new_folder
from jaxmed.models.checkpoints.safetensors_file import TYPES
from jaxmed.models.config import ModelConfig
from jaxmed.models.digests import known_digest
from jaxmed.models.params import Params, param_dtype, param_shapes, param_shardings

if TYPE_CHECKING:
    from jaxmed.models.model import Model

CARD, PARAMS = "jaxmed.json", "params"
FORMAT = 1
CHUNK_BYTES = 64 * 2**20
"""Stored pieces are no larger, so that a mesh of another shape reads little more than it keeps."""
HOST_GB = 4
"""How much Orbax holds on the host at a time, on the way from or to the devices."""
Leaves = dict[str, Any]


def is_store(path: Path) -> bool:
    """Whether a path is a checkpoint written by `save_store`."""
    return (path / CARD).is_file()


def save_store(model: Model, folder: str | Path) -> Path:
    """Writes `model` as a sharded checkpoint that `jaxmed.load` restores under any mesh, and returns the folder.

    Raises:
        UserError: an edit tagged "attack", a folder that holds something, a full disk, a model without a source config or kept
            as int8. Nothing is written then.
    """
    folder = Path(folder)
    describe_store(model, folder)
    card = {"format": FORMAT, "jaxmed": version("jaxmed"), "family": model.config.family, "dtype": model.config.dtype}
    card |= {"source": {"name": model.name, "revision": model.revision, "weights": model.files_digest}}
    card |= {"config": {**(model.source_config or {}), "dtype": model.config.dtype}}
    with new_folder(folder, _size(model.config)) as scratch:
        save_arrays(model.params, scratch / PARAMS)
        card |= {"files": _file_sizes(scratch)}
        (scratch / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        write_sums(scratch, [scratch / name for name in card["files"]])
        write_side_files(model, scratch, model.history)
    return folder


def describe_store(model: Model, folder: Path) -> list[str]:
    """What `save_store` would write, in words; raises what it raises before it needs the parameters."""
    refuse_attacks(model.history)
    check_writable(model)
    size, count = _size(model.config), len(jax.tree.leaves(param_shapes(model.config)))
    check_vacant(folder, size)
    tokenizer = ", tokenizer files" if model.tokenizer is not None else ""
    edits = ", jaxmed_edit.json, README.md with a warning" if model.history else ""
    return [
        f"{folder}: {CARD}{tokenizer}{edits}",
        f"{folder / PARAMS}: {count} arrays in {model.config.dtype} (norms in float32), {size:,} bytes before compression",
    ]


def open_store(folder: Path) -> Checkpoint:
    """Opens a checkpoint written by `save_store`.

    Raises:
        UserError: a card that is damaged or of another version; files that are missing or truncated.
    """
    card = read_json(folder / CARD)
    kinds = {"config": dict, "files": dict, "dtype": str}
    if card.get("format") != FORMAT or not all(isinstance(card.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{folder / CARD} is damaged, or of another version: format {card.get('format')!r}; this one reads {FORMAT}.")
    if card["dtype"] not in TYPES:
        raise unknown(f"dtype in {folder / CARD}:", card["dtype"], TYPES)
    held = _file_sizes(folder)
    problems = [f"{name} is missing" for name in card["files"] if name not in held]
    problems += [f"{name} has {held[name]:,} bytes, not {size:,}" for name, size in card["files"].items() if held.get(name, size) != size]
    if problems:
        raise all_problems(f"Checkpoint {folder}", problems, "Copy it again.")
    check_sums(folder, known_digest)

    def read(name: str, cut: Any = None) -> Any:
        raise UserError(f"{folder} holds parameters, and no tensor {name}.")

    restore = partial(restore_params, folder / PARAMS, card["dtype"])
    files = tuple(folder / name for name in card["files"])
    return Checkpoint({**card["config"], "dtype": card["dtype"]}, {}, read, files, lambda: read_tokenizer(folder), restore)


def _file_sizes(folder: Path) -> dict[str, int]:
    """Path within `folder` -> bytes, of every file of the parameters."""
    files = sorted(path for path in (folder / PARAMS).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def restore_params(folder: Path, stored: str, config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """The parameters of `config` on `mesh`: read in the dtype they are stored in, then cast where `config` asks for another.

    Raises:
        UserError: arrays that are missing, left over, of a wrong shape or dtype (all together), a damaged file, values that are
            not finite.
    """
    if config.int8:
        raise UserError("int8 weights are made from a Hugging Face folder or a GGUF file; convert this checkpoint to huggingface first.")
    as_stored = replace(config, dtype=stored)
    shapes, shardings = param_shapes(as_stored), param_shardings(as_stored, mesh)
    target = jax.tree.map(lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings)
    params = restore_arrays(folder, target)
    damaged = [name for name, leaf in _leaves(params).items() if not bool(_is_finite(leaf))]
    if damaged:
        raise all_problems(f"Checkpoint {folder}", [f"{name} holds values that are not finite" for name in damaged])
    return params if stored == config.dtype else _cast(params, config)


def restore_arrays(folder: Path, like: Params) -> Params:
    """A nested dict of arrays as `save_arrays` wrote it, onto the shapes, dtypes and shardings of `like`.

    Raises:
        UserError: arrays that are missing, left over, of a wrong shape or dtype (all together), or a damaged file.
    """
    import orbax.checkpoint as ocp

    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
    try:
        with _checkpointer() as orbax:
            held = orbax.metadata(folder.absolute()).item_metadata
            if held is None:
                raise ValueError("its list of arrays is missing")
            _check_arrays(folder, held.tree, target)
            arguments = ocp.checkpoint_utils.construct_restore_args(target)
            return orbax.restore(folder.absolute(), ocp.args.PyTreeRestore(target, restore_args=arguments))
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types on damaged files, the bare Exception among them
        raise UserError(f"{folder} cannot be read (damaged, or half copied?): {_reason(error)}") from None


def _check_arrays(folder: Path, tree: Any, shapes: Params) -> None:
    """Orbax casts silently, and pads or cuts where shapes differ, so all of it is checked before."""
    held, wanted = _leaves(tree), _leaves(shapes)
    problems = [f"missing array {name} {list(leaf.shape)}" for name, leaf in wanted.items() if name not in held]
    problems += [f"unknown array {name}" for name in held if name not in wanted]
    for name in held.keys() & wanted.keys():
        for what, found, says in (("shape", tuple(held[name].shape), wanted[name].shape), ("dtype", held[name].dtype, wanted[name].dtype)):
            if found != says:
                problems.append(f"array {name} has {what} {found}, {CARD} says {says}")
    if problems:
        raise all_problems(f"Checkpoint {folder}", sorted(problems), f"{CARD} and the arrays do not belong together.")


@contextmanager
def _checkpointer() -> Iterator[Any]:
    """A checkpointer of Orbax, whose threads log a traceback each where a file cannot be written; what is raised says it all."""
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=HOST_GB, restore_concurrent_gb=HOST_GB, save_device_host_concurrent_gb=HOST_GB)
    try:
        with ocp.Checkpointer(handler) as orbax:
            yield orbax
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """The innermost part of one of TensorStore's long messages."""
    return str(error).strip().partition("\n")[0].partition(" See full")[0].rpartition('": ')[2][:300] or type(error).__name__


def save_arrays(params: Params, folder: Path) -> None:
    """Writes a nested dict of arrays, each in the pieces that its devices hold.

    Raises:
        UserError: the disk refuses.
    """
    import orbax.checkpoint as ocp

    def pieces(path: Any, leaf: Any) -> Any:  # the blocks' arrays one layer a piece
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if path[0].key == "blocks" else ())

    try:
        with _checkpointer() as orbax:
            orbax.save(folder.absolute(), ocp.args.PyTreeSave(params, save_args=jax.tree.map_with_path(pieces, params)))
    except Exception as error:  # a full disk comes as one of many types
        raise UserError(f"Could not write the parameters: {_reason(error)}. Nothing was kept.") from None


def _cast(params: Params, config: ModelConfig) -> Params:
    return jax.tree.map_with_path(lambda path, leaf: leaf.astype(param_dtype(config, path[-1].key)), params)


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _size(config: ModelConfig) -> int:
    return sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in jax.tree.leaves(param_shapes(config)))


def _leaves(tree: Mapping[str, Any]) -> Leaves:
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
