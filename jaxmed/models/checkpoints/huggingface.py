"""A Hugging Face folder: config.json, one or many safetensors files, optional tokenizer files. No torch, no pickle, no remote code."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmed.errors import LONGEST, UserError, all_problems
from jaxmed.files import IRREGULAR, check_sums, is_irregular, parse_json
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.digests import known_digest

GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
READ = ("F64", "F32", "F16", "BF16")
"""Types of the tensors that are read, as safetensors files spell them."""
STRAY = ("adapter_model", "consolidated", "optimizer", "scheduler", "training_args", "rng_state", "random_states")
"""Beginnings of names of safetensors files that hold something else: adapters, the original release's layout, a trainer's state."""
MOST_JSON = 2**26
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
SIDE_FILES = (*TOKENIZER_FILES, "special_tokens_map.json", "chat_template.jinja", GENERATION)
"""Files of a model that are read where they are there."""


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder and reads the headers of its weight files.

    Raises:
        UserError: no config or weights; a missing, truncated or damaged file; a tensor that two files hold, or that the index names
            and no file holds.
    """
    config = read_json(folder / "config.json")
    files, promised = _weight_files(folder)
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unreadable: dict[str, str] = {}
    problems = []
    for file in files:
        try:
            held = read_tensor_header(file)
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: {error} (truncated or damaged? {file.stat().st_size if file.exists() else 0:,} bytes)")
            continue
        problems += [f"tensor {name} is in {where[name].name} and in {file.name}" for name in held if name in where]
        for name, (shape, kind) in held.items():
            where[name], shapes[name] = file, shape
            if kind not in READ:
                unreadable[name] = f"is stored as {kind}; {', '.join(READ)} are read"
    problems += [
        f"{INDEX} names {name}, and {file} does not hold it" for name, file in promised.items() if name not in where and not problems
    ]
    if problems:
        raise all_problems(f"Checkpoint {folder}", problems, "Copy or download the files again.")
    check_sums(folder, known_digest)

    def read(name: str, cut: tuple[slice, ...] | None = None) -> np.ndarray:
        with safe_open(where[name], framework="numpy") as handle:
            return handle.get_tensor(name) if cut is None else handle.get_slice(name)[cut]

    return Checkpoint(config, shapes, read, tuple(files), lambda: read_tokenizer(folder), unreadable=unreadable)


def read_tensor_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor; `safe_open` holds the header against the file."""
    with safe_open(file, framework="numpy") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - the handle is no mapping
        return {name: (tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; a UserError that names the file where it is missing or malformed."""
    if not file.is_file():
        raise UserError(f"No {file.name} in {file.parent}. A model folder holds config.json and safetensors files.")
    if file.stat().st_size > MOST_JSON:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes; no such file of a model exceeds {MOST_JSON:,}.")
    try:
        content = parse_json(file.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}; a JSON object is expected.")
    return content


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and the tensor -> file name map that an index promises (empty without an index).

    As `transformers` chooses: model.safetensors alone where there is one, whatever lies beside it, else what the index names. Files of
    other names are taken where neither is there, but for those that are known to be no model.
    """
    whole = folder / "model.safetensors"
    if whole.exists():
        return [_regular(whole)], {}
    if (folder / INDEX).is_file():
        promised = read_json(folder / INDEX).get("weight_map")
        if not isinstance(promised, dict) or not all(_is_file_name(name) for name in promised.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from names of tensors to names of files beside it. Copy it again.")
        files = sorted({folder / name for name in promised.values()})
        missing = [f"{file.name} is missing" for file in files if not file.is_file()]
        if missing:
            raise all_problems(f"Checkpoint {folder}", missing, "Copy or download the files again.")
        return files, promised
    files = sorted(_regular(file) for file in folder.glob("*.safetensors") if not file.name.startswith(STRAY))
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise UserError(
            f"No safetensors file in {folder} (it holds {found}). Pickled weights are not read; convert them to safetensors first."
        )
    return files, {}


def _regular(file: Path) -> Path:
    """The path of a file; a pipe or a device, from which reading may never end, is a UserError."""
    if not file.is_file():
        raise UserError(f"{file} {IRREGULAR}. Copy or download it again.")
    return file


def check_regular(folder: Path, names: Iterable[str]) -> None:
    """Raises a UserError where something in a folder has one of these names, and is no file: what it should say would be lost."""
    if odd := [name for name in names if is_irregular(folder / name)]:
        raise all_problems(f"Checkpoint {folder}", [f"{name} {IRREGULAR}" for name in odd], "Copy or download the files again.")


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; None where it holds no tokenizer files."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    alone = (folder / "tokenizer.model").is_file() and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    missing = [name for name in ("sentencepiece", "google.protobuf") if alone and not _is_installed(name)]
    if missing:
        raise UserError(
            f"{folder} has its tokenizer as tokenizer.model alone, which {' and '.join(missing)} read and which are not installed here. "
            "Install them with `pip install 'jaxmed[sentencepiece]'`."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types on damaged files
        reason = f"{type(error).__name__}: {error}"[:LONGEST]
        raise UserError(f"The tokenizer files in {folder} cannot be read: {reason}. Copy or download them again.") from None
