"""Identities that theory demands of effects, on tiny models and on the default model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.models.model import Model
from jaxmed.prompts import read_pairs
from tests import tiny, tolerances


def test_a_pair_of_equal_prompts_has_no_effects(tiny_model: Model) -> None:
    same = replace(tiny.PAIRS[0], source=tiny.PAIRS[0].base)
    table = jm.sweep(tiny_model, [same], unit=tiny.units_of(tiny_model.config), window=7)
    for unit in tiny.units_of(tiny_model.config):
        assert np.abs(table[unit].values).max() <= float(table.noise_floor.max()) + 1e-6


def test_the_last_residual_stream_carries_the_whole_total(tiny_model: Model) -> None:
    table = jm.sweep(tiny_model, tiny.PAIRS, ("log-odds", "logprob"), "residual_out")
    total = table.source_outcome - table.base_outcome
    assert np.abs((table.residual_out.isel(layer=-1) - total).values).max() <= tolerances.EFFECTS


def test_every_residual_stream_at_all_positions_carries_the_whole_total(tiny_model: Model) -> None:
    table = jm.sweep(tiny_model, tiny.PAIRS[:1], unit="residual_out", position="all")
    total = table.source_outcome - table.base_outcome
    assert np.abs((table.residual_out - total).values).max() <= tolerances.EFFECTS


def test_one_window_of_all_neurons_is_the_whole_mlp(plain_model: Model) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS[:1], unit=("window", "mlp_out"), window=plain_model.config.neurons)
    assert np.abs(table.window.values[..., 0] - table.mlp_out.values).max() <= tolerances.EFFECTS


def test_kl_of_a_fully_patched_run_is_zero(plain_model: Model) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS[:1], "kl", "residual_out")
    assert abs(float(table.source_outcome[0])) <= tolerances.EFFECTS
    assert float(table.base_outcome[0]) < -0.01
    assert np.abs((table.base_outcome + table.residual_out.isel(layer=-1)).values).max() <= tolerances.EFFECTS


def test_answers_do_not_see_each_other(plain_model: Model) -> None:
    alone = jm.sweep(plain_model, [replace(tiny.LONG[0], target=("Sure",), foil=("No",))], "prefix-gap", "mlp_out")
    other = replace(tiny.LONG[0], target=("Sure",), foil=("No",), response="something else altogether")
    both = jm.sweep(plain_model, [other], ("prefix-gap", "sequence-logprob"), "mlp_out")
    assert np.abs(alone.mlp_out.values - both.mlp_out.sel(outcome="prefix-gap").values).max() <= tolerances.EFFECTS


@pytest.mark.slow
def test_the_default_models_neurons_equal_naive_patching(default_model: Model) -> None:
    pair = read_pairs("harm")[0]
    table = jm.sweep(default_model, [pair], layers=[3, 17, 29])
    from tests import naive

    rng = np.random.default_rng(0)
    for layer in (3, 17, 29):
        strongest = int(np.abs(table.neuron.values[0, layer]).argmax())
        for index in (strongest, int(rng.integers(default_model.config.neurons))):
            wanted = naive.effects(default_model, pair, "last", "neuron", layer, index, "log-odds", 1)[0]
            assert float(table.neuron[0, layer, index]) == pytest.approx(wanted, abs=tolerances.EFFECTS)
    assert float(table.noise_floor[0]) <= tolerances.EFFECTS
