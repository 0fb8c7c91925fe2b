"""What devices send each other in a sweep, read from the compiled programs; and sweeps on meshes against one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from jaxmed.effects import readout
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.engine import open_window, prepare
from jaxmed.effects.mediators import patched_rows
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Picks
from jaxmed.runner import propagate
from tests import tiny
from tests.conftest import QUICK_COMPILES
from tests.meshes import MESHES, collectives

OUTCOMES = ("prefix-gap", "kl")
ROWS = 8


def programs(name: str, mesh: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The collectives of a chunk of neurons: of their patched rows, and of the restarted run with several blocks of the vocabulary."""
    monkeypatch.setattr(readout, "VOCABULARY_BYTES", 1.0)
    model = tiny.model(name, mesh=mesh)
    contrast = make_contrast(model, tiny.PAIRS[0], Reading("pair", "last", "chat", OUTCOMES))
    window = open_window(prepare(contrast, OUTCOMES, ("neuron",)), contrast.patches[0])
    units = Picks(np.zeros(ROWS, np.int32), np.ones(ROWS, np.int32), np.arange(ROWS, dtype=np.int32))
    placed = jax.device_put(units, jax.NamedSharding(model.mesh, jax.P("data")))
    rows = partial(patched_rows.lower, model.config, model.params, window.view, placed, ("neuron",), 1)  # type: ignore[attr-defined]
    stream = jax.ShapeDtypeStruct(
        (ROWS, window.size, model.config.width), np.float32, sharding=jax.NamedSharding(model.mesh, jax.P("data"))
    )
    how = {"reads": window.reads, "asked": window.reads.slots, "readout": Readout(OUTCOMES, model.mesh.shape["model"])}
    run = partial(propagate.lower, model.config, model.params, window.restart, stream, np.int32(2), **how)  # type: ignore[attr-defined]
    return collectives(rows().compile().as_text()), collectives(run().compile().as_text())


@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_devices_that_share_rows_send_each_other_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in programs(name, "data=2", monkeypatch):
        assert found == {"inside": [], "outside": []}


def test_devices_that_share_weights_add_up_what_attention_and_mlp_add_and_send_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, run = programs("llama", "data=1,model=2", monkeypatch)
    stream = ROWS * tiny.LLAMA.width
    assert run["inside"] == [("all-reduce", [stream])] * 2
    assert rows["inside"] == []
    assert_small([*rows["outside"], *run["outside"]], stream)


def assert_small(found: list[Any], most: int) -> None:
    """All are sums over devices, of no more numbers than the rows have, or the few answers' rows of the unembedding."""
    answers = 8 * tiny.LLAMA.width
    assert found
    for kind, sizes in found:
        assert kind == "all-reduce"
        assert max(sizes) <= max(most, answers)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """What `tests/meshes.py` prints."""
    flags = f"--xla_force_host_platform_device_count=8{QUICK_COMPILES}"
    done = subprocess.run([sys.executable, "-m", "tests.meshes"], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_sweeps_on_meshes_equal_one_device(measured: dict[str, Any], mesh: str) -> None:
    """Single units of all kinds, a set, a path; one token and all of them."""
    assert {"0 neuron", "0 window", "0 joint", "0 path", "1 head_out"} <= measured[mesh]["table"].keys()
    assert max(measured[mesh]["table"].values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_programs_of_whole_sweeps_send_no_weights(measured: dict[str, Any], mesh: str) -> None:
    names = {program["name"] for program in measured[mesh]["programs"]}
    split = "model=2" in mesh
    assert names == {"propagate", "patched_rows", "record", "_respond"} | (set() if split else {"run_layer", "read_out"})
    for program in measured[mesh]["programs"]:
        assert len(program["inside"]) == (2 if split and program["name"] != "patched_rows" else 0)
        assert {kind for kind, _ in (*program["inside"], *program["outside"])} <= ({"all-reduce"} if split else set())
