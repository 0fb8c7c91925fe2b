"""Compiles and FLOPs of the engine, counted rather than timed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.bench.shapes import SHAPES
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.cost import plan
from jaxmed.effects.engine import PreparedContrast, open_window
from jaxmed.effects.engine import prepare as prepare_contrast
from jaxmed.effects.job import make_job, shapes_of
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.readout import Readout
from jaxmed.effects.request import Request
from jaxmed.models.config import Rope
from jaxmed.models.model import Model
from jaxmed.models.params import param_shapes
from jaxmed.models.rope import frequencies
from jaxmed.runner import are_few, by_layer, causal_layout, forward, propagate
from jaxmed.runs.cost import count_flops, propagate_flops
from tests import tiny


def prepare(model: Model, pair: jm.PromptPair, position: str) -> PreparedContrast:
    """A pair, ready for sweeps of neurons."""
    return prepare_contrast(make_contrast(model, pair, Reading("pair", position, "chat", ("log-odds",))), ("log-odds",), ("neuron",))


def _compiled() -> dict[str, int]:
    """How many programs restarted runs have compiled to since `_forget`. A layer and the readout are programs of their own on the CPU."""
    sizes = {function.__name__: function._cache_size() for function in _JITTED}
    assert not sizes.pop("propagate")
    return sizes


def _forget() -> None:
    for function in _JITTED:
        function.clear_cache()


_JITTED: tuple[Any, ...] = (propagate, by_layer.run_layer, by_layer.read_out)


@pytest.mark.parametrize("layers", ["equal", pytest.param("different", marks=pytest.mark.slow)])
def test_one_compile_per_length_window_and_chunk(plain_model: Model, layers: str) -> None:
    """Also where layers differ in sliding window and RoPE base."""
    if layers == "different":
        different = replace(plain_model.config, windows=(4, 2**30, 9), local_rope=Rope(500.0))
        plain_model = replace(plain_model, config=different)
    _forget()
    jm.sweep(plain_model, tiny.PAIRS, unit=("neuron",))
    lengths = {len(prepare(plain_model, pair, "last").packed.tokens) for pair in tiny.PAIRS}
    assert _compiled() == {"run_layer": len(lengths), "read_out": 1}
    jm.sweep(plain_model, tiny.PAIRS[:1], unit=("neuron",), layers=[0, 2])
    assert _compiled() == {"run_layer": len(lengths), "read_out": 1}


@pytest.mark.slow
def test_each_position_reuses_programs_of_window_buckets(plain_model: Model) -> None:
    """The last layer has a program of its own where the window is long."""
    _forget()
    prepared = prepare(plain_model, tiny.PAIRS[2], "each")
    patches = prepared.contrast.patches
    opened = {window.size: window for window in (open_window(prepared, patch) for patch in patches)}
    long = sum(are_few(len(window.reads.slots), size) for size, window in opened.items())
    jm.sweep(plain_model, tiny.PAIRS[2:], unit="neuron", position="each")
    assert len(opened) < len(patches)
    assert _compiled()["run_layer"] == len(opened) + long


def test_planned_flops_equal_those_of_the_program(plain_model: Model) -> None:
    prepared = prepare(plain_model, tiny.PAIRS[0], "last")
    window, config = open_window(prepared, prepared.contrast.patches[0]), plain_model.config
    rows, seen = 10, len(prepared.packed.tokens)
    h = np.zeros((rows, 1, config.width), np.float32)
    how = {"reads": window.reads, "readout": Readout(("log-odds",), 1), "asked": window.reads.slots}
    program = jax.make_jaxpr(lambda first: propagate(config, plain_model.params, window.restart, h, first, **how))
    found = count_flops(program(np.int32(0)).jaxpr, trips=config.layers)
    readout = 2 * rows * config.width * len(window.reads.token) * len(window.reads.slots)
    assert found == propagate_flops(config, rows, 1, seen, config.layers) + readout


def test_planned_flops_of_a_long_window_equal_those_of_the_program(plain_model: Model) -> None:
    """The last block has queries and an MLP for the one token that is read."""
    prepared = prepare(plain_model, tiny.PAIRS[0], "all")
    window, config = open_window(prepared, prepared.contrast.patches[0]), plain_model.config
    rows, seen, asked = 10, len(prepared.packed.tokens), len(window.reads.slots)
    assert are_few(asked, window.size)
    h = np.zeros((rows, window.size, config.width), np.float32)
    how = {"reads": window.reads, "readout": Readout(("log-odds",), 1), "asked": window.reads.slots}
    program = jax.make_jaxpr(lambda first: propagate(config, plain_model.params, window.restart, h, first, **how))
    found = count_flops(program(np.int32(0)).jaxpr, trips=config.layers - 1)
    readout = 2 * rows * config.width * len(window.reads.token) * asked
    assert found == propagate_flops(config, rows, window.size, seen, config.layers, asked) + readout
    assert found < propagate_flops(config, rows, window.size, seen, config.layers)


def test_scans_are_counted_once_per_step() -> None:
    def many(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=7)[0]

    assert count_flops(jax.make_jaxpr(many)(np.ones((4, 4), np.float32)).jaxpr) == 7 * 2 * 4**3


@pytest.mark.parametrize("position", ["last", pytest.param("each", marks=pytest.mark.slow)])
def test_the_plan_counts_effects_and_passes_that_are_done(plain_model: Model, position: str, tmp_path) -> None:
    job = make_job(plain_model, tiny.PAIRS[1:], Request(units=tuple(MEDIATORS), position=position, window=5))
    planned = plan(job)
    table = jm.sweep(plain_model, tiny.PAIRS[1:], unit=tuple(MEDIATORS), position=position, window=5, out=tmp_path / "run")
    from jaxmed.runs.folder import read_run

    assert planned.effects == sum(int(np.isfinite(table[unit].values).sum()) for unit in MEDIATORS)
    assert planned.cost.passes == sum(session["passes"] for session in read_run(tmp_path / "run")["sessions"])


def test_memory_of_a_chunk_does_not_depend_on_the_number_of_units(plain_model: Model) -> None:
    import dataclasses

    from jaxmed.runs.cost import TOKENS_PER_DEVICE, units_per_device

    wide = dataclasses.replace(plain_model.config, neurons=10**6)
    for units in (10, 10**4, 10**6):
        assert units_per_device(wide, plain_model.mesh, units, 1, 64) <= TOKENS_PER_DEVICE["cpu"] + 8


def test_the_plan_of_last_token_neurons_carries_one_token_per_row(plain_model: Model) -> None:
    job = make_job(plain_model, tiny.PAIRS[:1], Request())
    config, (shape,) = plain_model.config, shapes_of(job.contrasts[0])
    rows = (job.chunk[shape.chunk_key("neuron")] + 1) * plain_model.mesh.shape["data"]
    restarts = sum(propagate_flops(config, rows, 1, shape.seen, config.layers - 1 - layer) for layer in range(config.layers))
    assert shape.window == 1
    assert plan(job).cost.flops == restarts + 2 * propagate_flops(config, 1, shape.seen, 0, config.layers)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_are_those_of_their_models(name: str) -> None:
    """The shapes of `jaxmed bench --shape`, traced without weights: every product fits, and RoPE turns whole heads."""
    config = replace(SHAPES[name], dtype="bfloat16")
    run = partial(forward, config, layout=causal_layout(2, 16), taps=("query",))
    logits, taps = jax.eval_shape(run, param_shapes(config), jax.ShapeDtypeStruct((2, 16), np.int32))
    assert logits.shape == (2, 16, config.vocabulary)
    assert taps["query"].shape == (config.layers, 2, 16, config.heads, config.head_width)
    assert config.rope is not None
    assert len(frequencies(config.rope, config.head_width)) == config.head_width // 2
    numbers = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
    published = {"smollm2-135m": 134_515_008, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248}
    published |= {"qwen2.5-0.5b": 494_032_768, "gemma-2-2b": 2_614_341_888}
    published |= {"llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800}
    assert numbers == published[name]
