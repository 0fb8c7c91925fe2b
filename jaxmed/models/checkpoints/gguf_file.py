"""A GGUF file, decoded by the `gguf` package and presented under Hugging Face names and layouts, by tables of architectures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES

from jaxmed.errors import UserError, all_problems, unknown
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.checkpoints.gguf_header import Header, TensorRecord, can_decode, read_header
from jaxmed.models.checkpoints.gguf_metadata import Facts, read_metadata
from jaxmed.models.checkpoints.gguf_tables import ARCHITECTURES, FACTORS, IGNORED, Architecture, Change
from jaxmed.models.checkpoints.gguf_tokenizer import build_tokenizer

MOST_EXPERTS = 4096
TENSOR = re.compile(
    r"(?:(?P<block>blk)\.(?P<layer>0|[1-9][0-9]*)\.)?(?P<name>[a-z_]+)(?:\.(?P<expert>0|[1-9][0-9]*))?\.(?P<end>weight|bias)"
)


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor in a GGUF file.

    Attributes:
        stored: where it lies.
        change: how it differs there.
        expert: its place on the first axis of a stack of experts; None where it is a tensor of its own.
    """

    stored: TensorRecord
    change: Change
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        found = self.stored.shape if self.expert is None else self.stored.shape[1:]
        return found[::-1] if self.change.transposed else found


def open_gguf(file: Path) -> Checkpoint:
    """Opens a GGUF file of any architecture of `gguf_tables` and any quantisation that the `gguf` package decodes.

    Raises:
        UserError: not a GGUF file, truncated, damaged, or of an architecture or with tensors or metadata that are not understood.
    """
    header = read_header(file)
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise unknown("GGUF architecture", name, ARCHITECTURES, "Load the Hugging Face folder of this model instead.")
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{file} is one of several parts. Put them together first, with `llama-gguf-split --merge`.")
    architecture = ARCHITECTURES[name]
    pieces, problems = _pieces(header, architecture)
    config = _config(header, name, architecture, problems)
    if problems:
        raise all_problems(f"GGUF file {file} of architecture {name}", problems, "Load the Hugging Face folder of this model instead.")

    def read(name: str, cut: tuple[slice, ...] | None = None) -> np.ndarray:
        return _read(header, pieces[name], config, cut)

    shapes = {name: piece.shape for name, piece in pieces.items()}
    return Checkpoint(config, shapes, read, (file,), lambda: build_tokenizer(header.metadata, name))


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...] from interleaved rotary order (0, 1 are a pair) to half-split order (0, H / 2 are a pair)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def _pieces(header: Header, architecture: Architecture) -> tuple[dict[str, Piece], list[str]]:
    """Every tensor by its checkpoint name, and the names that are not understood."""
    pieces: dict[str, Piece] = {}
    problems: list[str] = []
    for stored_name, stored in header.tensors.items():
        match = TENSOR.fullmatch(stored_name)
        key = ("blk." if match["block"] else "") + match["name"] + (".{e}" if match["expert"] else "") if match else ""
        if match and key in (*FACTORS, *IGNORED):
            continue
        if not match or key not in architecture.names:
            problems.append(f"unknown tensor {stored_name}")
        elif not can_decode(stored.kind):
            problems.append(f"tensor {stored_name} is of type {stored.kind.name}, which the gguf package does not decode")
        else:
            name, change = f"{architecture.names[key]}.{match['end']}", architecture.changes.get(key, Change())
            stacked = "{e}" in name and not match["expert"]
            if stacked and not (len(stored.shape) == 3 and stored.shape[0] <= MOST_EXPERTS):
                problems.append(f"tensor {stored_name} has shape {list(stored.shape)}; experts are stacked on the first of three axes")
                continue
            for expert in range(stored.shape[0]) if stacked else (None,):
                number = match["expert"] if expert is None else expert
                pieces[name.format(l=match["layer"], e=number)] = Piece(stored, change, expert)
    return pieces, problems


def _config(header: Header, name: str, architecture: Architecture, problems: list[str]) -> dict[str, Any]:
    """The Hugging Face config that the metadata describes; what is not understood is added to `problems`."""
    prefix = name + "."
    rest = {key[len(prefix) :]: value for key, value in header.metadata.items() if key.startswith(prefix)}
    facts = Facts(rest, {key: tensor.shape for key, tensor in header.tensors.items()}, _factors(header, problems))
    try:
        problems += read_metadata(facts, architecture.steps)
    except KeyError as missing:
        problems.append(f"the metadata lacks {missing}")
    except (TypeError, ValueError, ArithmeticError) as wrong:
        problems.append(f"the metadata holds a value that cannot be used: {wrong}")
    return {**facts.config, **_ends(header.metadata)}


def _ends(metadata: Mapping[str, Any]) -> dict[str, list[int]]:
    """Tokens that end an answer, of a file that names others beside its tokenizer's end; ids outside the vocabulary count as none."""
    named = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    count = len(metadata.get("tokenizer.ggml.tokens") or ())
    ends = {key: number for key, number in named.items() if isinstance(number, int) and 0 <= number < count}
    return {"eos_token_id": sorted({*ends.values()})} if {*ends.values()} - {ends.get("eos")} else {}


def _factors(header: Header, problems: list[str]) -> dict[str, tuple[float, ...]]:
    found: dict[str, tuple[float, ...]] = {}
    for name in FACTORS:
        tensor = header.tensors.get(name + ".weight")
        if tensor is None:
            continue
        if len(tensor.shape) != 1 or tensor.shape[0] > 2**16 or not can_decode(tensor.kind):
            problems.append(f"tensor {name}.weight has shape {list(tensor.shape)}; RoPE factors are one number per rotated pair")
        else:
            found[name] = tuple(_decode(header.rows(tensor), tensor).tolist())
    return found


AT_ONCE = 2**12
"""Numbers in a row as the `gguf` package is given it, which takes sixteen rows at a time: they fit into a core's cache."""


def _decode(rows: np.ndarray, tensor: TensorRecord) -> np.ndarray:
    """Bytes uint8 [..., bytes of a row] -> numbers float32 [..., numbers of a row]; blocks are decoded apart, so rows of any length do."""
    from gguf import dequantize

    block, size = GGML_QUANT_SIZES[tensor.kind]
    shape = (*rows.shape[:-1], rows.shape[-1] // size * block)
    blocks = rows.reshape(-1, size)
    per = max(1, AT_ONCE // block)
    whole = len(blocks) // per * per
    pieces = (blocks[:whole].reshape(-1, per * size), blocks[whole:].reshape(-1, size))
    with np.errstate(all="ignore"):  # values that are not finite are found, and named, when a checkpoint is assembled
        found = [np.asarray(dequantize(piece, tensor.kind), np.float32).reshape(-1) for piece in pieces if piece.size]
    return (found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.float32)])).reshape(shape)


def _read(header: Header, piece: Piece, config: dict[str, Any], cut: tuple[slice, ...] | None) -> np.ndarray:
    """A tensor, or slices of it: only the rows asked for are decoded."""
    change, rows = piece.change, header.rows(piece.stored)
    rows = rows if piece.expert is None else rows[piece.expert]
    cuts = (slice(None),) * len(piece.shape) if cut is None else cut
    first, *others = cuts[::-1] if change.transposed else cuts
    order: Any = first
    if change.heads:
        order = half_split(np.arange(piece.shape[0]), int(config[change.heads]))[first]
    if len(piece.shape) == 1:  # a vector is one row, and blocks of it cannot be taken apart
        array = _decode(rows, piece.stored)[order]
    else:
        array = _decode(rows[order], piece.stored)[(slice(None), *others)]
    array = array - np.float32(change.above) if change.above else array
    return array.T if change.transposed else array
