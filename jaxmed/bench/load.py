"""Loading against what it cannot avoid: reading the file and decoding its blocks once, and reading the decoded bytes."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.bench.rows import add_rows
from jaxmed.distributed import device_name, make_mesh
from jaxmed.errors import UserError
from jaxmed.models.catalog import locate
from jaxmed.models.checkpoints import decoded
from jaxmed.models.load import load
from jaxmed.runs.provenance import short_commit

FIRST, SECOND = 1.5, 2.0
"""Ratios that loading shall not exceed: a first load over reading and decoding, a second one over reading the decoded bytes."""


def measure_load(name: str, append: Path | None = None) -> dict[str, float]:
    """Loads a GGUF file twice, with a cache of its own, between plain readings of the same bytes; prints seconds and ratios.

    Returns:
        Seconds by what was done ("read and decode", "first load", "read decoded", "second load", ...), and the two ratios. A load counts
        the whole `load` without the self-check: header, weights, and what keeps the decoded weights. The tokenizer is built when it is
        first used; that is measured alone.

    Raises:
        UserError: a model that is not read from a GGUF file.
    """
    file = locate(name)
    if not file.is_file():
        raise UserError(f"{name!r} is not read from a GGUF file; what this measures is decoding.")
    make_mesh()
    jax.numpy.zeros(1).block_until_ready()  # the backend has started
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, _cache_in(Path(scratch)):
        found["read and decode"] = _seconds(lambda: _decode(file))
        found["first load"] = _seconds(lambda: jax.block_until_ready(load(str(file)).params))
        found["read decoded"] = _seconds(lambda: _read(Path(scratch) / "decoded"))
        found["second load"] = _seconds(lambda: jax.block_until_ready(load(str(file)).params))
        found["weights alone"] = _seconds(lambda: _weights(file))
        model = load(str(file))
        found["tokenizer, at its first use"] = _seconds(lambda: model.tokenizer)
    ratios = {"first ratio": found["first load"] / found["read and decode"], "second ratio": found["second load"] / found["read decoded"]}
    lines = [f"{what}: {seconds:.2f} s" for what, seconds in found.items()]
    lines += [f"first load: {ratios['first ratio']:.2f} x (goal {FIRST})", f"second load: {ratios['second ratio']:.2f} x (goal {SECOND})"]
    lines += [f"second load, weights alone: {found['weights alone'] / found['read decoded']:.2f} x"]
    print("\n".join(lines))
    if append is not None:
        _append(append, name, lines)
    return found | ratios


def _decode(file: Path) -> None:
    """Reads a file and decodes every tensor of it by the `gguf` package, one after the other."""
    from gguf import GGUFReader, dequantize

    file.read_bytes()
    for tensor in GGUFReader(file).tensors:
        dequantize(tensor.data, tensor.tensor_type)


def _read(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            np.fromfile(file, np.uint8)


def _weights(file: Path) -> Any:
    from jaxmed.models.families import read_config

    held = decoded.find(file, "float32")
    if held is None or held.restore is None:
        raise UserError("The decoded weights were not kept: is the disk full?")
    return jax.block_until_ready(held.restore(read_config(held.config)[1], make_mesh()))


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    before = os.environ.get("JAXMED_CACHE")
    os.environ["JAXMED_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("JAXMED_CACHE")
        if before is not None:
            os.environ["JAXMED_CACHE"] = before


def _append(file: Path, name: str, lines: list[str]) -> None:
    title = f"\n## {datetime.date.today()}, commit {short_commit()}, loading of {name}, {device_name(make_mesh())}\n\n"
    add_rows(file, title + f"`jaxmed bench load --name {name}`\n\n" + "".join(f"- {line}\n" for line in lines))
