"""Damage for checkpoint files: strategies that change bytes, headers and configs, and a tiny writer of GGUF headers that can lie."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from hypothesis import strategies as st

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
ODD_NUMBERS = (0, 1, -1, 3, 7, 33, 10**6, 10**30, 10**400, -(2**63), *HUGE, 0.5, -0.5, 1e-300, 1e38, 1e308, math.inf, -math.inf, math.nan)
ODD_TEXTS = ("", "x", "32", "nan", "default", "yarn", "longrope", "full_attention", "\ud800", "a\x00b", "x" * 5000)
ODD_VALUES = (None, True, False, *ODD_NUMBERS, *ODD_TEXTS, [], {}, [1], ["x"], {"x": 1}, [[]], {"full_attention": {}}, [None, -1.5])
"""What a config may hold where something else belongs."""
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=5)
SCALARS = st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6)
Damage = Callable[[bytes], bytes]

BYTE_STEPS: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "flip": lambda content, at, piece: content[:at] + bytes((content[at] ^ (piece[0] or 1),)) + content[at + 1 :],
    "write": lambda content, at, piece: content[:at] + piece + content[at + len(piece) :],
    "insert": lambda content, at, piece: content[:at] + piece + content[at:],
    "drop": lambda content, at, piece: content[:at] + content[at + len(piece) :],
    "cut": lambda content, at, piece: content[:at],
    "number": lambda content, at, piece: content[:at] + struct.pack("<Q", HUGE[piece[0] % len(HUGE)]) + content[at + 8 :],
}


@st.composite
def byte_damage(draw: st.DrawFn, header: int) -> Damage:
    """One to four changes of bytes, mostly in the first `header` of them."""
    one = st.tuples(st.sampled_from(sorted(BYTE_STEPS)), _places(header), st.binary(min_size=1, max_size=9))
    steps = draw(st.lists(one, min_size=1, max_size=4))

    def apply(content: bytes) -> bytes:
        for step, place, piece in steps:
            content = BYTE_STEPS[step](content or b"?", place % max(len(content), 1), piece)
        return content

    return apply


def _places(header: int) -> st.SearchStrategy[int]:
    return st.integers(0, header) | st.integers(0, header) | st.integers(0, 10**7)


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY_KEYS = ("dtype", "shape", "data_offsets", "extra")
DTYPES = st.sampled_from(
    ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "I32", "U32", "I8", "U8", "BOOL", "C64", "f32", "Q8_0")
)
SHAPES = st.lists(st.sampled_from((0, 1, 2, 16, 24, 264, -1, 1.5, *HUGE)), max_size=5)
OFFSETS = st.lists(st.sampled_from((0, 1, 4, 64, 1024, 4096, -4, 10**6, *HUGE)), min_size=2, max_size=2)


@st.composite
def header_damage(draw: st.DrawFn) -> Damage:
    """Changes the JSON header of a safetensors file, keeping it JSON; or announces a wrong length of it."""
    kinds = st.sampled_from(("entry", "entry", "delete", "rename", "add", "swap", "metadata"))
    steps = draw(
        st.lists(st.tuples(kinds, st.integers(0, 99), st.integers(0, 99), DTYPES, SHAPES, OFFSETS, VALUES), min_size=1, max_size=3)
    )
    length = draw(st.none() | st.none() | st.sampled_from((0, 1, 7, 10**6, *HUGE)))

    def apply(content: bytes) -> bytes:
        header, data = split_safetensors(content)
        for kind, one, two, dtype, shape, offsets, value in steps:
            names = sorted(header) or ["none"]
            name, other = names[one % len(names)], names[two % len(names)]
            entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            if kind == "entry" and isinstance(header.get(name), dict):
                key = ENTRY_KEYS[two % 4]
                header[name][key] = entry.get(key, value)
            elif kind == "delete":
                header.pop(name, None)
            elif kind == "rename":
                header[name.replace("model", "m\ud800")] = header.pop(name, value)
            elif kind == "add":
                header["model.ghost"] = entry
            elif kind == "swap" and name in header and other in header:
                header[name], header[other] = header[other], header[name]
            elif kind == "metadata":
                header["__metadata__"] = value
        return join_safetensors(header, data, length)

    return apply


@st.composite
def config_damage(draw: st.DrawFn, known: tuple[str, ...]) -> Callable[[dict[str, Any]], Any]:
    """Changes values of a config, at its top or one level down, deletes keys, or adds some."""
    keys = st.sampled_from(known) | st.sampled_from(("rope_parameters", "rope_scaling", "layer_types", "sliding_window", "no_such_key"))
    inner = st.sampled_from(
        ("rope_type", "rope_theta", "factor", "full_attention", "original_max_position_embeddings", "long_factor", "type")
    )
    steps = draw(
        st.lists(st.tuples(st.sampled_from(("set", "set", "set", "delete", "inside")), keys, inner, VALUES), min_size=1, max_size=3)
    )
    whole = draw(st.integers(0, 60)) == 60

    def apply(config: dict[str, Any]) -> Any:
        found: Any = deepcopy(config)
        for kind, key, below, value in steps:
            if kind == "delete":
                found.pop(key, None)
            elif kind == "inside":
                held = found.get(key)
                found[key] = {**(held if isinstance(held, dict) else {}), below: value}
            else:
                found[key] = value
        return steps[0][3] if whole else found

    return apply


class _Writer:
    """Bytes of a GGUF header whose numbers can be replaced: `lies` by their order in the file, or by their label."""

    def __init__(self, lies: Mapping[int | str, int]):
        self.out, self.lies, self.numbers = bytearray(b"GGUF"), lies, 0

    def number(self, code: str, value: int, label: str) -> None:
        value = self.lies.get(label, self.lies.get(self.numbers, value)) % 2 ** (8 * struct.calcsize(code))
        self.out.extend(struct.pack("<" + code, value))
        self.numbers += 1

    def text(self, value: str, label: str) -> None:
        self.number("Q", len(value.encode()), f"length of {label}")
        self.out.extend(value.encode())

    def value(self, key: str, value: Any) -> None:
        first = value[0] if isinstance(value, list) else value
        kind = {str: 8, float: 6, int: 4}[type(first)]
        self.number("I", 9 if isinstance(value, list) else kind, f"type of {key}")
        if isinstance(value, list):
            self.number("I", kind, f"item type of {key}")
            self.number("Q", len(value), f"items of {key}")
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, str):
                self.text(item, f"value of {key}")
            elif isinstance(item, float):
                self.out.extend(struct.pack("<f", item))
            else:
                self.number("I", item, key)


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray], lies: Mapping[Any, int] | None = None) -> bytes:
    """A GGUF file, version 3, whose every count, length, type and offset can be replaced."""
    writer = _Writer(lies or {})
    writer.number("I", 3, "version")
    writer.number("Q", len(tensors), "tensors")
    writer.number("Q", len(metadata), "keys")
    for key, value in metadata.items():
        writer.text(key, key)
        writer.value(key, value)
    start = 0
    for name, array in tensors.items():
        writer.text(name, name)
        writer.number("I", array.ndim, f"axes of {name}")
        for axis, size in enumerate(reversed(array.shape)):
            writer.number("Q", size, f"axis {axis} of {name}")
        writer.number("I", 0, f"type of {name}")
        writer.number("Q", start, f"offset of {name}")
        start += -(-array.nbytes // 32) * 32
    writer.out.extend(b"\0" * (-len(writer.out) % 32))
    for array in tensors.values():
        writer.out.extend(array.astype("<f4").tobytes() + b"\0" * (-array.nbytes % 32))
    return bytes(writer.out)


LIES = st.dictionaries(
    st.integers(0, 400), st.sampled_from((0, 1, 2, 3, 4, 5, 8, 9, 12, 32, 33, 64, 99, 1000, *HUGE)), min_size=1, max_size=3
)
