"""The two branches of a gated MLP, as sites and as units."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.edits import read_edits
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.models.transformer import blocks_from, open_block
from tests import naive, tiny, tolerances

UNGATED = "windowed_biased"


@pytest.mark.parametrize("kind", ["llama", "mixture"])
def test_a_neuron_is_the_activated_gate_times_the_up_branch(kind: str) -> None:
    taps = jm.forward(tiny.model(kind), np.arange(9), taps=("hook_pre", "mlp.hook_pre_linear", "neuron"))[1]
    gate, up, neuron = (np.asarray(values, np.float64) for values in taps.values())
    assert np.abs(gate / (1 + np.exp(-gate)) * up - neuron).max() <= tolerances.RESIDUAL


def test_without_a_gate_the_neuron_is_the_activated_branch() -> None:
    taps = jm.forward(tiny.model(UNGATED), np.arange(9), taps=("gate", "neuron"))[1]
    assert np.abs(np.asarray(jax.nn.gelu(taps["gate"], approximate=False) - taps["neuron"])).max() <= tolerances.RESIDUAL


def test_effects_of_the_branches_are_those_of_the_neuron_that_they_make(plain_model: Model) -> None:
    """Both together are the neuron; where the up branch keeps its base value, so are edits of the neuron."""
    sets = {"both": [("gate", 1, 4), ("up", 1, 4)], "overridden": [("gate", 1, 4), ("neuron", 1, 4)]}
    table = jm.sweep(plain_model, tiny.PAIRS, unit=("neuron", "gate", "up"), sets=sets)
    assert table.gate.dims == table.up.dims == table.neuron.dims == ("pair", "layer", "neuron_index")
    for name in sets:
        assert np.abs(table.joint.sel(set=name).values - table.neuron.values[:, 1, 4]).max() <= tolerances.EFFECTS
    assert np.abs(table.gate + table.up - table.neuron).max() > 10 * tolerances.EFFECTS, "they interact"


@pytest.mark.parametrize("patch", ["zero", "scale"])
def test_other_patches_go_with_branches(plain_model: Model, patch: str) -> None:
    """A zero gate is no neuron at all, and half of an up branch half a neuron."""
    factor = {"scale": 0.5}.get(patch)
    table = jm.sweep(plain_model, tiny.PAIRS[:2], unit=("neuron", "up", "gate"), patch=patch, patch_factor=factor)
    assert np.abs(table.up.values - table.neuron.values).max() <= tolerances.EFFECTS
    if patch == "zero":
        assert np.abs(table.gate.values - table.neuron.values).max() <= tolerances.EFFECTS
    assert np.abs(table.gate.values).max() > 10 * tolerances.EFFECTS


def test_branches_are_ranked_traced_tapped_and_edited_from_a_file(plain_model: Model, tmp_path: Path) -> None:
    jm.sweep(plain_model, tiny.PAIRS, unit=("gate", "up"), out=tmp_path / "run", top=3)
    with (tmp_path / "run" / "top.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["unit"] for row in rows] == ["gate"] * 3 + ["up"] * 3
    assert all(row["promotes"] for row in rows)
    traced = jm.trace(plain_model, tiny.PAIRS[:1], unit="up")
    assert traced.up.dims == ("pair", "layer", "neuron_index", "position")
    (tmp_path / "edits.json").write_text('[{"kind": "zero", "site": "hook_pre_linear", "layer": 1, "unit": 3}]')
    edits = read_edits(tmp_path / "edits.json")
    neuron = jm.forward(plain_model, np.arange(6), edits, taps=("neuron",))[1]["neuron"]
    assert (np.asarray(neuron)[1, 0, :, 3] == 0).all()
    assert len(jm.generate(plain_model, ["do a"], max_tokens=2, edits=edits)) == 1


REFUSED: dict[str, Any] = {
    "forward taps": lambda model: jm.forward(model, np.arange(4), taps=("hook_pre_linear",)),
    "forward edits": lambda model: jm.forward(model, np.arange(4), jm.edits.zero("up", layer=1)),
    "activations": lambda model: jm.activations(model, ["do a"], "up"),
    "sweep": lambda model: jm.sweep(model, tiny.PAIRS, unit=("gate", "up")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_mlp_without_a_gate_has_no_up_branch(name: str) -> None:
    with pytest.raises(UserError, match="This model has no 'up': its MLP has one branch, without a gate"):
        REFUSED[name](tiny.model(UNGATED))


def test_a_set_of_units_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="up is no unit of this model; legal: neuron, gate, window"):
        jm.sweep(tiny.model(UNGATED), tiny.PAIRS, sets={"a": [("up", 0, 1)]})


def test_a_block_takes_its_branches_apart_only_where_they_are_touched(plain_model: Model) -> None:
    config = plain_model.config
    block = open_block(config, jax.tree.map(lambda x: x[0], blocks_from(plain_model.params["blocks"], 0)))
    h = np.ones((1, 3, config.width), np.float32)
    trace = lambda touch: str(jax.make_jaxpr(lambda h: block.mlp(h, touch_branch=touch))(h))  # noqa: E731
    plain, read, edited = trace(None), trace(lambda name, a: a), trace(lambda name, a: 2 * a if name == "up" else a)
    assert len(plain) < len(read) < len(edited)


def test_gradients_reach_both_branches(plain_model: Model) -> None:
    """The sum over units against a central difference in all of them."""
    units = list(range(plain_model.config.neurons))

    def logit(gate: Any, site: str) -> Any:
        return jm.forward(plain_model, np.arange(6), {site: replace(jm.edits.zero(site, 1, -1, units)[site], gate=gate)})[0][0, -1, 7]

    for site in ("gate", "up"):
        step = np.full(len(units), 0.02, np.float32)
        slope = float(logit(step, site) - logit(-step, site)) / 0.04
        assert float(jax.grad(logit)(0 * step, site).sum()) == pytest.approx(slope, rel=0.02)
        assert abs(slope) > 0.01


def test_several_tokens_equal_full_forwards_of_both_branches(plain_model: Model) -> None:
    pair = tiny.PAIRS[1]
    table = jm.sweep(plain_model, [pair], unit=("gate", "up"), position="header")
    for unit, layer, index in (("gate", 0, 2), ("up", 1, 20), ("up", 2, 7)):
        (wanted,) = naive.effects(plain_model, pair, "header", unit, layer, index, "log-odds", 1)
        assert float(table[unit][0, layer, index]) == pytest.approx(wanted, abs=tolerances.EFFECTS)
