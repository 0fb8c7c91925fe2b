"""A model back into a Hugging Face folder: config, tokenizer, and safetensors under the names of the family's table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxmed.errors import UserError, all_problems
from jaxmed.files import write_sums
from jaxmed.models.checkpoints.edit_record import check_edit, refuse_attacks, write_edits
from jaxmed.models.checkpoints.huggingface import GENERATION
from jaxmed.models.checkpoints.new_folder import check_vacant, new_folder
from jaxmed.models.checkpoints.safetensors_file import Tensor, into_files, tensor, write_file, write_index
from jaxmed.models.checkpoints.tensors import is_stacked, layer_tensors, needed_rules, split_layer
from jaxmed.models.families import FAMILIES
from jaxmed.models.families.table import Rule
from jaxmed.models.params import param_shapes

if TYPE_CHECKING:
    from jaxmed.models.model import Model

FILE_BYTES = 5 * 10**9
"""Weight files are no larger than this, a single tensor apart."""
LENGTH = "original_max_position_embeddings"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_folder(model: Model, folder: str | Path, edit: Mapping[str, Any] | None = None, file_bytes: int = FILE_BYTES) -> Path:
    """Writes `model` as a folder that `transformers` loads, and returns the folder.

    Every tensor has the model's dtype; one that was not edited is bit-equal to its source where the source has that dtype. A head
    that is tied to the embedding is not written. Host memory: one layer of one parameter. The folder appears whole or not at all.

    Args:
        folder: absent or empty.
        edit: what was done to the weights, as JSON values; it is recorded in jaxmed_edit.json, with what the model's source
            records, and a model card warns of it. The key "tag" says what the edit is for.
        file_bytes: size limit of a weight file.

    Raises:
        UserError: an edit tagged "attack", a folder that holds something, a full disk, parameters that the family has no names for
            or that are not finite, a model without a source config, or one kept as int8. Nothing is written then.
    """
    folder = Path(folder)
    if edit is not None:
        check_edit(edit)
    edits = (*model.history, *([edit] if edit else []))
    files = plan_export(model, edits, file_bytes)
    _check_params(model)
    arrays = _arrays(model)
    with new_folder(folder, sum(one.size for held in files.values() for one in held)) as scratch:
        for name, held in files.items():
            write_file(scratch / name, held, model.config.dtype, arrays)
        write_index(scratch, files)
        write_sums(scratch, [scratch / name for name in files])
        (scratch / "config.json").write_text(json.dumps(huggingface_config(model), indent=2) + "\n", encoding="utf-8")
        write_side_files(model, scratch, edits)
    return folder


def plan_export(model: Model, edits: Any = None, file_bytes: int = FILE_BYTES) -> dict[str, list[Tensor]]:
    """Weight file -> the tensors it will hold; needs no parameters. Raises a UserError where the model may not or cannot be written."""
    refuse_attacks(model.history if edits is None else edits)
    check_writable(model)
    dtype = np.dtype(model.config.compute)
    names = (pair for rule, layer in _pieces(model) for pair in layer_tensors(rule, model.config, layer))
    return into_files((tensor(name, shape, dtype) for name, shape in names), file_bytes)


def check_writable(model: Model) -> None:
    """Raises a UserError for a model that no checkpoint can be made of: without a source config, or kept as int8."""
    if model.source_config is None:
        raise UserError(f"{model.name!r} has no source config, so no checkpoint can be made of it. Load it from one, or set source_config.")
    if model.config.int8:
        raise UserError("A model kept as int8 is not written: its weights are rounded. Load it without int8.")


def write_side_files(model: Model, folder: Path, edits: Any) -> None:
    """Writes what goes with any copy of the weights: the tokenizer, the generation config, the record of edits."""
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if model.source is not None and (model.source / GENERATION).is_file():
        shutil.copyfile(model.source / GENERATION, folder / GENERATION)
    title = Path(model.name).resolve().name if Path(model.name).exists() else model.name
    write_edits(folder, title, {"name": title, "revision": model.revision, "weights": model.files_digest if edits else None}, edits)


def huggingface_config(model: Model) -> dict[str, Any]:
    """The config.json of `model`: that of its source with the model's dtype; completed where the source was no Hugging Face folder."""
    raw = dict(model.source_config or {})
    raw |= (
        {"tie_word_embeddings": model.config.tied} if bool(raw.get("tie_word_embeddings", model.config.tied)) != model.config.tied else {}
    )
    raw |= dict.fromkeys({"dtype", "torch_dtype"} & raw.keys() or {"dtype"}, model.config.dtype)
    return raw if "architectures" in raw else _completed(raw, model)


def _completed(raw: dict[str, Any], model: Model) -> dict[str, Any]:
    """A config with what transformers needs beside the sizes, said outright where its classes have a default for one model's sake."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    found = CLASSES.get(raw["model_type"], ())
    raw["architectures"] = [found] if isinstance(found, str) else list(found)
    raw = {key: getattr(model.tokenizer, key, None) for key in TOKENS} | raw
    given = raw.get("rope_scaling") or {}
    if given.get("rope_type") == "factors":
        raw["rope_scaling"] = _as_longrope(given, raw["max_position_embeddings"])
    if LENGTH in given and LENGTH in FAMILIES[model.config.family].known:
        raw[LENGTH] = given[LENGTH]
    return raw


def _as_longrope(given: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Frequency factors, as GGUF files have them, in the words of Hugging Face configs: LongRoPE whose short and long texts agree."""
    factors, amplitude = list(given["factors"]), given.get("attention_factor", 1.0)
    same = {"short_factor": factors, "long_factor": factors, "factor": 1.0, LENGTH: length}
    return {"rope_type": "longrope", **same, "attention_factor": amplitude}


def _pieces(model: Model) -> Iterator[tuple[Rule, int]]:
    """Every (rule, layer), layer by layer, in the order in which tensors are written."""
    rules = needed_rules(FAMILIES[model.config.family], model.config)
    yield from ((rule, 0) for rule in rules if not is_stacked(rule))
    yield from ((rule, layer) for layer in range(model.config.layers) for rule in rules if is_stacked(rule))


def _arrays(model: Model) -> Iterator[np.ndarray]:
    """Every tensor, in the order of `_pieces`, in the model's dtype."""
    config = model.config
    for rule, layer in _pieces(model):
        value = model.params
        for key in rule.path:
            value = value[key]
        host = np.asarray(_take(value, layer) if is_stacked(rule) else value).astype(config.compute, copy=False)
        if not np.isfinite(host.sum(dtype=np.float64)):
            raise UserError(f"Parameter {'/'.join(rule.path)} of layer {layer} holds values that are not finite. Nothing was written.")
        yield from (part for _, part in split_layer(rule, config, layer, host))


@jax.jit
def _take(stack: jax.Array, layer: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def _check_params(model: Model) -> None:
    """All parameters of the config are there, of its shapes, and whole on this host."""
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(param_shapes(model.config))}
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(model.params)}
    problems = [f"missing parameter {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unknown parameter {name}" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if found[name].shape != wanted[name].shape:
            problems.append(f"parameter {name} has shape {list(found[name].shape)}, the config says {list(wanted[name].shape)}")
        elif isinstance(found[name], jax.Array) and not found[name].is_fully_addressable:
            problems.append(f"parameter {name} lies on several hosts; export on one, or convert to orbax")
    if problems:
        raise all_problems(f"Model {model.name}", sorted(problems))


def describe_export(model: Model, folder: Path) -> list[str]:
    """What `export_folder` would write, in words; raises what it raises before it needs the parameters."""
    files = plan_export(model)
    sizes = {name: sum(one.size for one in held) for name, held in files.items()}
    check_vacant(folder, sum(sizes.values()))
    tensors = sum(len(held) for held in files.values())
    return [
        f"{folder}: config.json{', tokenizer files' if model.tokenizer is not None else ''}"
        f"{', jaxmed_edit.json, README.md with a warning' if model.history else ''}",
        *(f"{folder / name}: {size:,} bytes" for name, size in sizes.items()),
        f"{tensors} tensors in {model.config.dtype}, {sum(sizes.values()):,} bytes in all",
    ]
