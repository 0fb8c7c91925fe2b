"""Restarted runs by a program of one layer: the loop's numbers, without copies of weights."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.distributed import make_mesh
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.engine import open_window, prepare
from jaxmed.effects.mediators import patched_rows
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Picks
from jaxmed.models.model import Model
from jaxmed.runner import Entry, are_few, by_layer, each_layer, lies_by_layer, propagate, propagate_by_layer
from tests import tiny

OUTCOMES = ("log-odds", "kl")
ROWS = 8


def both(model: Model, position: str, first: int, late: bool, minus: bool = False) -> list[np.ndarray]:
    """Outcomes of neurons' rows by the loop, and by layer."""
    contrast = make_contrast(model, tiny.PAIRS[0], Reading("pair", position, "chat", OUTCOMES))
    window = open_window(prepare(contrast, OUTCOMES, ("neuron", "head_out")), contrast.patches[0])
    assert are_few(len(window.reads.slots), window.size) == (position == "all")
    layer = np.arange(ROWS, dtype=np.int32) % 3 if late else np.full(ROWS, first - 1, np.int32)
    kind = np.arange(ROWS, dtype=np.int32) % 2 if late else np.zeros(ROWS, np.int32)
    index = np.arange(ROWS, dtype=np.int32)
    units = Picks(kind, layer, np.where(kind == 1, index // 2, 3 * index))
    placed = jax.device_put(units, jax.NamedSharding(model.mesh, jax.P("data")))
    rows, mid = patched_rows(model.config, model.params, window.view, placed, ("neuron", "head_out"), 1)
    how: dict[str, Any] = {"reads": window.reads, "asked": window.reads.slots, "readout": Readout(OUTCOMES, 1)}
    how |= {"entry": Entry(rows, placed.layer, mid) if late else None, "minus": 0.5 * rows if minus else None}
    ways = propagate, propagate_by_layer
    return [np.asarray(way(model.config, model.params, window.restart, rows, np.int32(first), **how)) for way in ways]


@pytest.mark.parametrize("name", ["llama", "mixture", *(pytest.param(n, marks=pytest.mark.slow) for n in ("post_norm", "windowed_biased"))])
@pytest.mark.parametrize("position", ["last", "all"])
def test_numbers_are_those_of_the_loop(name: str, position: str) -> None:
    """Rows that begin behind one layer, rows that join at layers of their own, and rows that no layer follows."""
    compare = partial(both, tiny.model(name), position)
    found = np.asarray([compare(1, False), compare(0, True), compare(3, False, True)])
    np.testing.assert_allclose(found[:, 1], found[:, 0], rtol=0, atol=2e-6)
    assert np.ptp(found, axis=-1).max() > 1e-2


def _begins(array: jax.Array) -> list[int]:
    """Where the array lies in the memory of every device."""
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def test_weights_are_not_copied_and_not_held_on_to() -> None:
    held = len(by_layer._apart)
    stack = jax.device_put(jnp.ones((3, 64, 64)), jax.NamedSharding(make_mesh(), jax.P()))
    parts = each_layer({"down": stack})
    assert each_layer({"down": stack}) is parts
    begins = _begins(stack)
    for number, part in enumerate(parts):
        assert _begins(part["down"]) == [begin + number * 4 * 64**2 for begin in begins]
    del stack, parts, part
    gc.collect()
    assert len(by_layer._apart) == held


def test_weights_that_are_split_stay_in_the_loop() -> None:
    assert lies_by_layer(tiny.model("llama").params)
    assert not any(lies_by_layer(tiny.model("llama", mesh=mesh).params) for mesh in ("fsdp=2", "tensor=2"))
