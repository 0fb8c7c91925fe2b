"""What devices send each other in a sweep, read from the compiled programs; and sweeps on meshes against one device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from jaxmed.axes import row_sharding, vocabulary_parts
from jaxmed.effects import readout
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.engine import open_window, prepare
from jaxmed.effects.mediators import patched_rows
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Picks
from jaxmed.finetuning.feed import Feed
from jaxmed.finetuning.job import make_job
from jaxmed.finetuning.settings import make_settings
from jaxmed.finetuning.train import make_optimiser, make_step, start
from jaxmed.models.params import block_letters
from jaxmed.runner import propagate
from tests import mesh_grid, tiny
from tests.conftest import QUICK_COMPILES
from tests.finetuning_sets import EXAMPLES
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
    placed = jax.device_put(units, row_sharding(model.mesh))
    rows = partial(patched_rows.lower, model.config, model.params, window.view, placed, ("neuron",), 1)  # type: ignore[attr-defined]
    stream = jax.ShapeDtypeStruct((ROWS, window.size, model.config.width), np.float32, sharding=row_sharding(model.mesh))
    how = {"reads": window.reads, "asked": window.reads.slots, "readout": Readout(OUTCOMES, vocabulary_parts(model.mesh))}
    run = partial(propagate.lower, model.config, model.params, window.restart, stream, np.int32(2), **how)  # type: ignore[attr-defined]
    return collectives(rows().compile().as_text()), collectives(run().compile().as_text())


@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_devices_that_share_rows_send_each_other_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in programs(name, "data=2", monkeypatch):
        assert found == {"inside": [], "outside": []}


def test_devices_that_share_weights_add_up_what_attention_and_mlp_add_and_send_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, run = programs("llama", "tensor=2", monkeypatch)
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


def layer_sizes(name: str) -> list[int]:
    """Numbers of every matrix of one layer."""
    config = tiny.CONFIGS[name]
    letters = [held for held in block_letters(config).values() if "D" in held and len(held) > 1]
    return sorted(math.prod(config.sizes[letter] for letter in held) for held in letters)


@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_devices_that_share_layers_gather_one_layer_at_a_time_and_no_unembedding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, run = programs(name, "fsdp=2", monkeypatch)
    stream, answers = ROWS * tiny.CONFIGS[name].width, 8 * tiny.CONFIGS[name].width
    assert {kind for kind, _ in run["inside"]} == {"all-gather"}
    assert sorted(size for _, sizes in run["inside"] for size in sizes) == layer_sizes(name)
    assert rows["inside"] == []
    assert max(size for _, sizes in (*rows["outside"], *run["outside"]) for size in sizes) <= max(stream, answers)


def test_a_step_gathers_a_layer_forward_and_once_more_back_and_no_unembedding() -> None:
    model, settings = tiny.model("llama", mesh="fsdp=2"), make_settings(method="full", batch=8, steps=2)
    job = make_job(model, EXAMPLES, (), settings)
    optimiser = make_optimiser(settings, job.steps)
    trained, state, frozen, moved = start(model, settings, optimiser)
    step = make_step(model.config, settings, optimiser, model.mesh, moved)
    compiled = step.lower(trained, state, frozen, Feed(job).batch(0)).compile()
    found = collectives(compiled.as_text())
    gathered = [size for kind, sizes in found["inside"] if kind == "all-gather" for size in sizes]
    assert sorted(gathered) == sorted(2 * layer_sizes("llama"))
    table = model.params["embedding"].size
    assert table not in [size for _, sizes in found["outside"] for size in sizes]
    after = jax.tree.map(lambda leaf, one: one.is_equivalent_to(leaf.sharding, leaf.ndim), trained, compiled.output_shardings[0])
    assert all(jax.tree.leaves(after))


@pytest.mark.parametrize("mesh", ["fsdp=2", pytest.param("tensor=2", marks=pytest.mark.slow)])
def test_sweeps_of_split_weights_equal_one_device(mesh: str) -> None:
    found, alone = (mesh_grid.numbers("llama", one, [mesh_grid.of_sweeps]) for one in (mesh, "data=1"))
    assert max(mesh_grid.apart(found, alone).values()) < 1e-5


def printed(module: str, *arguments: str, devices: int = 8) -> dict[str, Any]:
    """What a program of `tests` prints, run on so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}{QUICK_COMPILES}"
    command = [sys.executable, "-m", f"tests.{module}", *arguments]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", mesh_grid.KINDS)
def test_all_ways_to_put_eight_devices_on_three_axes_equal_one_device(kind: str) -> None:
    """A sweep, estimates, a step of fine-tuning, scores of responses and of weights. Ten meshes are compiled for, hence its minutes."""
    found = printed("mesh_grid", kind)
    assert set(found) == {f"{kind} {mesh}" for mesh in mesh_grid.GRID}
    assert max(value for one in found.values() for value in one.values()) < 1e-5


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """What `tests/meshes.py` prints."""
    return printed("meshes")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_sweeps_on_meshes_equal_one_device(measured: dict[str, Any], mesh: str) -> None:
    """Single units of all kinds, a set, a path; one token and all of them."""
    assert {"0 neuron", "0 window", "0 joint", "0 path", "1 head_out"} <= measured[mesh]["table"].keys()
    assert max(measured[mesh]["table"].values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_programs_of_whole_sweeps_send_no_weights_but_a_layer_over_fsdp(measured: dict[str, Any], mesh: str) -> None:
    names = {program["name"] for program in measured[mesh]["programs"]}
    split, gathers = "tensor=2" in mesh, 4 if "fsdp=2" in mesh else 0
    assert names == {"propagate", "patched_rows", "record", "_respond"} | (set() if split else {"run_layer", "read_out"})
    for program in measured[mesh]["programs"]:
        inside = [kind for kind, _ in program["inside"]]
        runs = program["name"] != "patched_rows"
        assert inside.count("all-gather") == (gathers if runs else 0)
        assert inside.count("all-reduce") == len(inside) - inside.count("all-gather") == (2 if split and runs else 0)
        sent = (*program["inside"], *program["outside"])
        assert gathers or {kind for kind, _ in sent} <= ({"all-reduce"} if split else set())
        assert not {size for _, sizes in sent for size in sizes} & {TABLE, TABLE // 2, TABLE // 4}


TABLE = tiny.LLAMA.vocabulary * tiny.LLAMA.width
"""Numbers of the unembedding."""
