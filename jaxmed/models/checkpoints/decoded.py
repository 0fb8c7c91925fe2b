"""Decoded weights of quantised files, kept in the cache folder: a second load maps them into memory and decodes nothing.

FOLDER/decoded/KEY holds one file per parameter as it lies in memory, `decoded.json`, and the tokenizer, once it has been built. The key
changes with the file, the dtype and the code that reads it. Every piece has a checksum, which is verified on the way in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.errors import UserError
from jaxmed.files import is_whole, sealed, write_json
from jaxmed.files.seal import SEAL
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.checkpoints.assemble import in_threads
from jaxmed.models.checkpoints.gguf_file import open_gguf
from jaxmed.models.config import ModelConfig
from jaxmed.models.digests import code_digest, known_digest
from jaxmed.models.folders import cache_folder
from jaxmed.models.params import Params, param_shapes, param_shardings

CARD, TOKENIZER = "decoded.json", "tokenizer.json"
LIMIT, LIMIT_GB = "JAXMED_DECODED_GB", 20.0
"""Environment variable, and its default: gigabytes that may be kept, of the models used last; 0 keeps nothing."""
LEAST = 2**26
"""Bytes from which keeping pays."""
PIECE = 2**25
"""Bytes under one checksum."""


def find(file: Path, dtype: str) -> Checkpoint | None:
    """The decoded weights of a file as a checkpoint; None where they are not kept, or were made by other code."""
    if _limit() <= 0:
        return None
    folder = _folder(file, dtype)
    try:
        card = _read_card(folder)
        config, arrays, shapes = dict(card["config"]), dict(card["arrays"]), {name: tuple(shape) for name, shape in card["shapes"].items()}
        if any((folder / name).stat().st_size != entry["size"] for name, entry in arrays.items()):
            raise ValueError("a file is cut")
        os.utime(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None

    def read(name: str, cut: Any = None) -> np.ndarray:
        raise UserError(f"{folder} holds parameters, and no tensor {name}.")

    def restore(wanted: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
        return _restore(folder, arrays, wanted, mesh)

    return Checkpoint(config, shapes, read, (file,), lambda: open_gguf(file).tokenizer(), restore)


def keep(file: Path, checkpoint: Checkpoint, config: ModelConfig, params: Params) -> None:
    """Keeps decoded weights for the next load, where there is room, and says so once on stderr; else does nothing."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    root = cache_folder() / "decoded"
    if not LEAST <= size <= _limit() * 1e9 or any(not leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
        return
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        _make_room(root, size)
        if shutil.disk_usage(root).free < 2 * size:
            return
        target = _folder(file, config.dtype)
        with tempfile.TemporaryDirectory(prefix="part-", dir=root, ignore_cleanup_errors=True) as held:
            scratch = Path(held) / "whole"
            scratch.mkdir()
            made_of = {"file": known_digest(file), "dtype": config.dtype}
            _write(scratch, checkpoint, params, made_of)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
        _drop_others(target, made_of)
        print(f"Decoded weights of {file.name} are kept in {root} ({size / 1e9:.2f} GB; {LIMIT}=0 turns this off).", file=sys.stderr)


def drop(file: Path, dtype: str) -> None:
    """Forgets the decoded weights of a file."""
    shutil.rmtree(_folder(file, dtype), ignore_errors=True)


class Damage(Exception):
    """Decoded weights that are not what was written."""


def _limit() -> float:
    given = os.environ.get(LIMIT, "")
    try:
        return float(given) if given else LIMIT_GB
    except ValueError:
        raise UserError(f"{LIMIT} is {given!r}; a number of gigabytes is expected, 0 to keep nothing.") from None


def _folder(file: Path, dtype: str) -> Path:
    code = f"{code_digest(Path(__file__).parents[1])} {version('gguf')}"
    key = hashlib.sha256(f"{known_digest(file)} {dtype} {sys.byteorder} {code}".encode()).hexdigest()
    return cache_folder() / "decoded" / key[:32]


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {".".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _pieces(content: np.ndarray) -> Iterator[memoryview]:
    yield from (content[at : at + PIECE].data for at in range(0, len(content), PIECE))


def _read_card(folder: Path) -> dict[str, Any]:
    """What an entry is of; a ValueError where it is damaged."""
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    if not is_whole(card) or SEAL not in card:
        raise ValueError(f"{CARD} is damaged")
    return card


def _drop_others(kept: Path, made_of: Mapping[str, str]) -> None:
    """Drops what other code made of the same file: nothing reads it any more."""
    for folder in kept.parent.iterdir():
        with contextlib.suppress(OSError, ValueError):
            if folder != kept and made_of.items() <= _read_card(folder).items():
                shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, checkpoint: Checkpoint, params: Params, made_of: Mapping[str, str]) -> None:
    arrays = {}
    for name, leaf in _leaves(params).items():
        content = np.asarray(leaf).reshape(-1).view(np.uint8)
        with (folder / name).open("wb") as handle:
            handle.write(content.data)
        arrays[name] = {"size": content.nbytes, "sums": [zlib.crc32(piece) for piece in _pieces(content)]}
    shapes = {name: list(shape) for name, shape in checkpoint.shapes.items()}
    card = {**made_of, "config": dict(checkpoint.config), "arrays": arrays, "shapes": shapes}
    (folder / CARD).write_text(json.dumps(sealed(card)), encoding="utf-8")


def _restore(folder: Path, arrays: Mapping[str, Any], config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """The parameters of `config`, mapped from their files.

    Raises:
        Damage: files that do not fit the config or their checksums.
    """
    shapes, shardings = _leaves(param_shapes(config)), _leaves(param_shardings(config, mesh))
    if arrays.keys() != shapes.keys():
        raise Damage("other parameters")
    mapped = {}
    for name, shape in shapes.items():
        if arrays[name]["size"] != math.prod(shape.shape) * shape.dtype.itemsize:
            raise Damage(f"{name} has another size")
        mapped[name] = np.memmap(folder / name, np.uint8, "c") if arrays[name]["size"] else np.empty(0, np.uint8)
    pieces = [(piece, found) for name, held in mapped.items() for piece, found in zip(_pieces(held), arrays[name]["sums"], strict=True)]
    if not all(in_threads(lambda number: zlib.crc32(pieces[number][0]) == pieces[number][1], range(len(pieces)))):
        raise Damage("a checksum differs")
    params: Params = {}
    for name, shape in shapes.items():
        host = mapped[name].view(np.ndarray).view(shape.dtype).reshape(shape.shape)
        target = params
        *path, last = name.split(".")
        for key in path:
            target = target.setdefault(key, {})
        target[last] = jax.make_array_from_callback(shape.shape, shardings[name], lambda index, host=host: host[index])
    return params


def tokenizer(file: Path, dtype: str, build: Callable[[], Any]) -> Any:
    """The tokenizer that `build` builds, from where it is kept beside the decoded weights; it is kept there now if it is not yet."""
    held = _folder(file, dtype) / TOKENIZER
    with contextlib.suppress(Exception):  # the tokenizers library raises many types on what it did not write
        found = json.loads(held.read_text(encoding="utf-8"))
        if is_whole(found) and SEAL in found:
            return _read_tokenizer(found["tokenizer"])
    made = build()
    if held.parent.is_dir():
        with contextlib.suppress(OSError):
            described = None if made is None else {"backend": made.backend_tokenizer.to_str(), "settings": dict(made.init_kwargs)}
            write_json(held, sealed({"tokenizer": described}))
    return made


def _read_tokenizer(described: Mapping[str, Any] | None) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if described is None:
        return None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(described["backend"]), **described["settings"])


def _make_room(root: Path, size: int) -> None:
    """Drops what was used longest ago, until `size` more bytes are within the limit."""
    held = sorted((folder for folder in root.iterdir() if folder.is_dir()), key=lambda folder: folder.stat().st_mtime)
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in held}
    total = sum(sizes.values()) + size
    for folder in held:
        if total > _limit() * 1e9:
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]
