"""Safetensors files written tensor by tensor, so that no more than one tensor need be in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmed.models.checkpoints.huggingface import INDEX

TYPES = {"float32": "F32", "bfloat16": "BF16"}
"""Our dtype names -> those of the format."""
INTEGERS = {"int64": "I64"}
"""The same of what is no weight."""


class Tensor(NamedTuple):
    """Name, shape and bytes of a tensor to be written."""

    name: str
    shape: tuple[int, ...]
    size: int


def tensor(name: str, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """The entry of a tensor of `dtype`."""
    return Tensor(name, shape, math.prod(shape) * dtype.itemsize)


def into_files(tensors: Iterable[Tensor], limit: int) -> dict[str, list[Tensor]]:
    """File name -> the tensors it will hold, in order; a file exceeds `limit` bytes only where a single tensor does."""
    files: list[list[Tensor]] = [[]]
    used = 0
    for one in tensors:
        if files[-1] and used + one.size > limit:
            files.append([])
            used = 0
        files[-1].append(one)
        used += one.size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": held for number, held in enumerate(files, 1)}


def write_file(
    file: Path, tensors: Sequence[Tensor], dtype: str, arrays: Iterator[np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file; takes the next arrays, in the order of `tensors` and of their shape. `metadata`: by default those of weights.

    The format (huggingface/safetensors): 8 bytes with the header's length, a JSON header padded to a multiple of 8, the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    begin = 0
    for one in tensors:
        header[one.name] = {"dtype": (TYPES | INTEGERS)[dtype], "shape": list(one.shape), "data_offsets": [begin, begin + one.size]}
        begin += one.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for one in tensors:
            array = np.ascontiguousarray(next(arrays))
            assert (array.shape, array.nbytes) == (one.shape, one.size), one.name
            handle.write(array.reshape(-1).view(np.uint8).data)


def write_index(folder: Path, files: Mapping[str, Sequence[Tensor]]) -> None:
    """Writes the index of a checkpoint of several files; nothing for one file."""
    if len(files) == 1:
        return
    total = sum(one.size for held in files.values() for one in held)
    where = {one.name: file for file, held in files.items() for one in held}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
