"""The header of a GGUF file (versions 2 and 3), read strictly: every length is held against the file before anything is allocated.

Only the header is read here; tensors are decoded by the `gguf` package. Its own reader trusts the lengths it finds, and spends seconds on
the vocabulary, which it wraps token by token.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from jaxmed.errors import UserError, all_problems

VERSIONS = (2, 3)
MOST_ITEMS = 2**23
"""The longest array of metadata that is read: no vocabulary has more entries."""
SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}
"""Type of a metadata value -> how numpy spells it."""


class GGUFError(Exception):
    """The header cannot be read on."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in a file: its type, shape (rows first, as in checkpoints), and where its bytes lie."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensors.

    Attributes:
        metadata: every key's value; arrays are lists.
        tensors: where every tensor lies.
        content: the whole file, mapped, uint8.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorRecord]
    content: np.ndarray

    def rows(self, tensor: TensorRecord) -> np.ndarray:
        """The bytes of a tensor, uint8, shaped as it is but for the last axis."""
        block, size = GGML_QUANT_SIZES[tensor.kind]
        flat = self.content[tensor.start : tensor.start + tensor.size]
        return flat.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * size)


def read_header(file: Path) -> Header:
    """Reads the header of a GGUF file.

    Raises:
        UserError: not a GGUF file, truncated or damaged; or tensors that overlap, lie outside the file, or are of unknown types.
    """
    problems: list[str] = []
    try:
        content: Any = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
        metadata, tensors = _Reader(memoryview(content)).read(problems)
    except (GGUFError, OSError) as error:
        raise UserError(f"{file} is not a readable GGUF file ({_bytes_of(file)}; truncated or damaged?): {error}.") from None
    if problems:
        raise all_problems(f"GGUF file {file} ({_bytes_of(file)})", problems, "Copy or download the file again.")
    return Header(metadata, tensors, content.view(np.ndarray))


@cache
def can_decode(kind: GGMLQuantizationType) -> bool:
    """Whether the `gguf` package turns tensors of this type into numbers."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _bytes_of(file: Path) -> str:
    return f"{file.stat().st_size:,} bytes" if file.is_file() else "no file"


class _Reader:
    """A position in the bytes of a file, which moves over what is read."""

    def __init__(self, content: memoryview):
        self.content, self.at = content, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.at

    def take(self, size: int, what: str) -> int:
        """Moves on by `size` bytes; returns where they start."""
        if size > self.left:
            raise GGUFError(f"{what} of {size:,} bytes at byte {self.at:,}, where {self.left:,} are left")
        self.at += size
        return self.at - size

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.content, self.take(struct.calcsize(code), "a number"))[0]

    def count(self, least: int, what: str) -> int:
        """A count of things that take `least` bytes each."""
        found = self.number("Q")
        if found * least > self.left:
            raise GGUFError(f"{found:,} {what} announced at byte {self.at:,}, where {self.left:,} bytes are left")
        return found

    def text(self, errors: str = "strict") -> str:
        size = self.number("Q")
        start = self.take(size, "a text")
        try:
            return str(self.content[start : start + size], "utf-8", errors)
        except UnicodeDecodeError:
            raise GGUFError(f"a name at byte {start:,} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text("surrogateescape")
        if kind == GGUFValueType.ARRAY:
            return self.array()
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            raise GGUFError(f"a value of unknown type {kind} at byte {self.at:,}")
        spelled = np.dtype(SCALARS[GGUFValueType(kind)])
        start = self.take(count * spelled.itemsize, "an array")
        if spelled.kind == "b":  # any byte but zero is true
            return [byte != 0 for byte in self.content[start : start + count]]
        return np.frombuffer(self.content, spelled, count, start).tolist()

    def array(self) -> list[Any]:
        kind = self.number("I")
        count = self.count(8 if kind == GGUFValueType.STRING else 1, "array items")
        if count > MOST_ITEMS:
            raise GGUFError(f"an array of {count:,} items at byte {self.at:,}; {MOST_ITEMS:,} are the most that is read")
        if kind == GGUFValueType.STRING:
            return [self.text("surrogateescape") for _ in range(count)]
        return self.scalars(kind, count)

    def read(self, problems: list[str]) -> tuple[dict[str, Any], dict[str, TensorRecord]]:
        """Metadata and tensors; what is wrong with single tensors is added to `problems`."""
        if bytes(self.content[self.take(4, "the magic number") : 4]) != b"GGUF":
            raise GGUFError("it does not begin with 'GGUF'")
        version = self.number("I")
        if version not in VERSIONS:
            big = " (written on a big-endian machine?)" if version & 0xFFFF == 0 else ""
            raise GGUFError(f"its version is {version}{big}; {' and '.join(map(str, VERSIONS))} are read")
        tensors, pairs = self.count(24, "tensors"), self.count(13, "metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text()
            if key in metadata:
                problems.append(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.number("I"))
        found = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise GGUFError(f"general.alignment is {alignment!r}; it is a power of two")
        return metadata, self.place(found, -(-self.at // alignment) * alignment, alignment, problems)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (rows first), type and offset of the next tensor."""
        name, axes = self.text(), self.number("I")
        if not 0 < axes <= 4:
            raise GGUFError(f"tensor {name!r} has {axes} axes; 1 to 4 are possible")
        shape = tuple(self.number("Q") for _ in range(axes))
        return name, shape[::-1], self.number("I"), self.number("Q")

    def place(self, found: list[Any], begin: int, alignment: int, problems: list[str]) -> dict[str, TensorRecord]:
        """The tensors by name, after checks of types, sizes and places."""
        tensors: dict[str, TensorRecord] = {}
        for name, shape, kind, offset in found:
            wrong = _wrong_type(shape, kind)
            size = 0 if wrong else _size(shape, GGMLQuantizationType(kind))
            if not wrong and begin + offset + size > len(self.content):
                wrong = f"ends at byte {begin + offset + size:,} of a file of {len(self.content):,} bytes"
            if not wrong and offset % alignment:
                wrong = f"starts at offset {offset:,}, which is no multiple of {alignment}"
            if not wrong and name in tensors:
                wrong = "occurs twice"
            if wrong:
                problems.append(f"tensor {name} {wrong}")
            else:
                tensors[name] = TensorRecord(GGMLQuantizationType(kind), shape, begin + offset, size)
        _check_overlaps(tensors, problems)
        return tensors


def _wrong_type(shape: tuple[int, ...], kind: int) -> str:
    if kind not in GGML_QUANT_SIZES:
        return f"is of type {kind}, which the gguf package does not know"
    block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)][0]
    if 0 in shape or shape[-1] % block:
        return f"has shape {list(shape)}; its rows hold a positive multiple of {block} values"
    return ""


def _size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    for length in shape:
        size *= length  # Python's integers do not overflow
    return size // block


def _check_overlaps(tensors: dict[str, TensorRecord], problems: list[str]) -> None:
    end, last = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda pair: pair[1].start):
        if tensor.start < end:
            problems.append(f"tensor {name} overlaps tensor {last}")
        if tensor.start + tensor.size > end:
            end, last = tensor.start + tensor.size, name
