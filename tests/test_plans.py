"""Plans of sweeps on devices that are not there: what is compiled from shapes alone, against what is known of the program."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

import jaxmed as jm
from jaxmed.bench.abstract import compile_chunk, sweep_flops
from jaxmed.bench.shapes import SHAPES
from jaxmed.effects.cost import plan
from jaxmed.effects.job import make_job
from jaxmed.effects.request import Request
from jaxmed.effects.shapes import shapes_of
from jaxmed.models.model import Model
from jaxmed.models.params import param_shapes
from tests import tiny
from tests.test_meshes import layer_sizes, printed

ROWS, PROMPT = 8, 16


@pytest.mark.parametrize(("mesh", "rows", "layer"), [("data=2", 1, 0), ("tensor=2", 1, 2), ("fsdp=2", 2, 0)])
def test_a_chunk_compiled_from_shapes_has_the_weights_and_messages_of_its_mesh(mesh: str, rows: int, layer: int) -> None:
    found = compile_chunk(tiny.LLAMA, jm.make_mesh(mesh), ROWS, PROMPT)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(param_shapes(tiny.LLAMA)))
    norms = whole - 4 * (tiny.LLAMA.layers * sum(layer_sizes("llama")) + 2 * tiny.LLAMA.vocabulary * tiny.LLAMA.width)
    parts = 1 if mesh == "data=2" else 2
    assert found.weights == (whole - norms) // parts + norms
    assert found.peak > found.weights
    sums, gathered = layer * ROWS * tiny.LLAMA.width, sum(layer_sizes("llama")) if mesh == "fsdp=2" else 0
    assert found.layer == 4 * (sums + gathered)
    assert (found.ends > 0) == (parts == 2)


def test_the_flops_of_a_plan_are_those_of_a_sweep_but_for_padding_and_base_rows(plain_model: Model) -> None:
    job = make_job(plain_model, tiny.PAIRS[:1], Request(units=("neuron",)))
    (shape,) = shapes_of(job.contrasts[0])
    rows = (job.chunk[shape.chunk_key("neuron")] + 1) * plain_model.mesh.shape["data"]
    ours, forwards = (sweep_flops(config, shape.seen) for config in (plain_model.config, replace(plain_model.config, layers=1)))
    swept = plan(job).cost.flops - plain_model.config.layers * forwards
    assert swept == pytest.approx((ours - plain_model.config.layers * forwards) * rows / plain_model.config.neurons)


@pytest.mark.slow
def test_a_sweep_of_70b_compiles_for_64_devices_and_fits_80_gb() -> None:
    """Split eight ways over heads and neurons, eight ways over layers' columns. A CPU's compiler keeps float32 copies of weights, too."""
    found = printed("abstract_plan", "llama-3.1-70b", "tensor=8,fsdp=8", devices=64)
    config = SHAPES["llama-3.1-70b"]
    assert found["weights"] == pytest.approx(2 * 70.55e9 / 64, rel=0.01)
    assert found["weights"] < found["peak"] - found["copies"] < found["weights"] + 1e9
    assert found["peak"] < 80e9
    gathered = 2 * config.layer_weights / 8
    sums = 2 * 4 * 1024 * config.width
    assert found["layer"] == pytest.approx(gathered + sums, rel=0.01)
