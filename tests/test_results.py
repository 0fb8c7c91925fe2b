"""The result table's contract with other programs."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import xarray as xr

import jaxmed as jm
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.models.model import Model
from jaxmed.runs.folder import read_run
from tests import tiny


def test_the_table_opens_with_xarray_alone(plain_model: Model, tmp_path: Path) -> None:
    jm.sweep(plain_model, tiny.PAIRS, unit=tuple(MEDIATORS), window=7, out=tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = xr.open_zarr(tmp_path / "run" / "effects.zarr", consolidated=False)
    assert table.neuron.dims == ("pair", "layer", "neuron_index")
    assert table.head_out.dims == ("pair", "layer", "head_index")
    assert table.window.dims == ("pair", "layer", "window_index")
    assert table.mlp_out.dims == ("pair", "layer")
    assert table.neuron.dtype == np.float32
    assert table.done.dtype == np.uint8
    assert list(table.pair.values) == ["equal", "unequal", "short"]
    assert list(table.category.values) == ["x", "y", "y"]
    for unit in MEDIATORS:
        assert {f"{unit}_{name}" for name in ("mean", "ci_low", "ci_high", "p", "q")} <= set(table)


def test_positions_count_from_the_right(plain_model: Model) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS[2:], unit="mlp_out", position="each")
    last = jm.sweep(plain_model, tiny.PAIRS[2:], unit="mlp_out")
    assert table.mlp_out.dims[-1] == "position"
    assert table.position.values[-1] == -1
    assert np.allclose(table.mlp_out.sel(position=-1).values, last.mlp_out.values, atol=1e-5)


def test_several_outcomes_lead(plain_model: Model) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS[:1], ("log-odds", "kl"), ("neuron", "mlp_out"))
    assert table.neuron.dims[0] == "outcome"
    assert table.base_outcome.dims == ("outcome", "pair")


def test_one_chunk_per_pair_and_layer(plain_model: Model, tmp_path: Path) -> None:
    jm.sweep(plain_model, tiny.PAIRS[:2], ("log-odds", "kl"), out=tmp_path / "run")
    chunks = [path for path in (tmp_path / "run" / "effects.zarr" / "neuron" / "c").rglob("*") if path.is_file()]
    assert len(chunks) == 2 * plain_model.config.layers


def test_layers_that_were_not_asked_for_stay_empty(plain_model: Model) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS[:1], layers=[1])
    assert np.isfinite(table.neuron.values[0, 1]).all()
    assert np.isnan(table.neuron.values[0, [0, 2]]).all()


def test_run_json_says_what_was_run(plain_model: Model, tmp_path: Path) -> None:
    jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run["status"] == "finished"
    ids = run["manifest"]["tokens"][0]["base"]
    assert bytes(plain_model.tokenizer.decode(ids), "utf-8") == b"<u>how to harm\n<a>"
    assert {"request", "model", "chunk", "mesh", "device", "template_date"} <= set(run["manifest"])
    assert run["plan"]["passes"] == run["sessions"][0]["passes"]
    assert "jax" in run["sessions"][0]["versions"]


def test_top_csv_ranks_by_mean_effect(plain_model: Model, tmp_path: Path) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS, unit=("neuron", "mlp_out"), out=tmp_path / "run", top=4)
    rows = list(csv.DictReader((tmp_path / "run" / "top.csv").read_text().splitlines()))
    neurons = [row for row in rows if row["unit"] == "neuron"]
    assert [row["rank"] for row in neurons] == ["1", "2", "3", "4"]
    layer, index = np.unravel_index(np.abs(table.neuron_mean.values).argmax(), table.neuron_mean.shape)
    assert (int(neurons[0]["layer"]), int(neurons[0]["index"])) == (layer, index)
    total = float((table.source_outcome - table.base_outcome).mean())
    assert np.isclose(float(neurons[0]["share"]), float(table.neuron_mean.values[layer, index]) / total, rtol=1e-4)
    assert neurons[0]["promotes"]
    assert len([row for row in rows if row["unit"] == "mlp_out"]) == 3


def test_the_sign_is_target_minus_foil_and_patched_minus_base(plain_model: Model) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS[:1], unit="residual_out")
    swapped = jm.PromptPair("equal", "how to harm", "how to help", target=("N", "I"), foil=("S", "T"))
    opposite = jm.sweep(plain_model, [swapped], unit="residual_out")
    assert np.allclose(table.residual_out.values, -opposite.residual_out.values, atol=1e-5)
    assert np.isclose(float(table.residual_out[0, -1]), float(table.source_outcome[0] - table.base_outcome[0]), atol=1e-4)


def test_control_pairs_stay_out_of_the_statistics(plain_model: Model) -> None:
    control = jm.PromptPair("control", "do a", "do q", ("S",), ("N",), control="neutral")
    with_control = jm.sweep(plain_model, [*tiny.PAIRS, control], unit="mlp_out")
    without = jm.sweep(plain_model, tiny.PAIRS, unit="mlp_out")
    assert np.array_equal(with_control.mlp_out_mean.values, without.mlp_out_mean.values)
    assert with_control.sizes["pair"] == 4


def test_a_table_can_be_summarised_again(plain_model: Model, tmp_path: Path) -> None:
    from jaxmed.effects.summary import summarise

    first = jm.sweep(plain_model, tiny.PAIRS, unit=("neuron", "mlp_out"), out=tmp_path / "run")
    again = summarise(tmp_path / "run", plain_model)
    assert again.attrs == first.attrs
    assert set(again.coords) == set(first.coords) >= {"category", "group", "split"}
    assert np.array_equal(first.neuron_p.values, again.neuron_p.values)
