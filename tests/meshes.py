"""A program of its own, for a process with eight CPU devices: the collectives of restarted runs, and sweeps on meshes against one device.

Prints JSON: mesh -> {"programs": [{"name", "inside", "outside"}], "table": variable -> largest difference from one device}. "inside" and
"outside" list (kind, numbers) of every collective in a loop and elsewhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import jaxmed as jm
from jaxmed.bench import abstract
from jaxmed.effects import engine, joint, readout
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.runner import by_layer
from tests import tiny

MESHES = ("data=1", "data=8", "data=4,tensor=2", "data=2,fsdp=2,tensor=2")
SETS = {"two": [("neuron", 1, 3), ("head_out", 1, 2), ("mlp_out", 0, 0)]}
PATHS = {"one": (("neuron", 0, 5), [("neuron", 2, 1), ("head_out", 1, 0)])}


def collectives(text: str | None) -> dict[str, list[tuple[str, list[int]]]]:
    """(kind, numbers of every array) of the collectives of a compiled program, those of loops apart."""
    found = abstract.collectives(text)
    return {where: [(kind, [count for _, count in sizes]) for kind, sizes in held] for where, held in found.items()}


def watched(name: str, function: Any, programs: list[dict[str, Any]]) -> Callable[..., Any]:
    """The jitted function; every program that it compiles to is noted."""

    def call(*given: Any, **named: Any) -> Any:
        before = function._cache_size()
        found = function(*given, **named)
        if function._cache_size() > before:
            programs.append({"name": name, **collectives(function.lower(*given, **named).compile().as_text())})
        return found

    return call


def sweep(mesh: str, **how: Any) -> Any:
    """One sweep on a mesh."""
    return jm.sweep(tiny.model("llama", mesh=mesh), tiny.PAIRS[:1], outcome=("prefix-gap", "kl"), window=5, **how)


def main() -> None:
    """Sweeps on every mesh, and prints what was found."""
    readout.VOCABULARY_BYTES = 1.0  # blocks of the vocabulary, as many as can be
    found: dict[str, Any] = {}
    first: dict[str, np.ndarray] = {}
    jitted = ((engine, "propagate"), (joint, "propagate"), (engine, "patched_rows"), (engine, "record"), (joint, "_respond"))
    jitted += (by_layer, "run_layer"), (by_layer, "read_out")
    functions = [getattr(module, name) for module, name in jitted]
    for mesh in MESHES:
        programs: list[dict[str, Any]] = []
        for (module, name), function in zip(jitted, functions, strict=True):
            setattr(module, name, watched(name, function, programs))
        tables = [sweep(mesh, unit=tuple(MEDIATORS), sets=SETS, paths=PATHS), sweep(mesh, unit=("neuron", "head_out"), position="all")]
        values = {f"{number} {name}": one.values for number, table in enumerate(tables) for name, one in table.data_vars.items()}
        values = {name: one for name, one in values.items() if one.dtype.kind == "f"}
        first = first or values
        apart = {name: float(np.nanmax(np.abs(one - first[name]))) for name, one in values.items() if np.isfinite(one).any()}
        found[mesh] = {"programs": programs, "table": apart}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
