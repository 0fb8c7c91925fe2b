"""The result table's contract with other programs."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import jaxmed as jm
from jaxmed.cli import show
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.ranking import write_top
from jaxmed.files import read_csv
from jaxmed.models.model import Model
from jaxmed.reports.page import write_report
from jaxmed.results.table import Table
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
        assert {f"{unit}_{name}" for name in ("mean", "ci_low", "ci_high", "t", "p", "p_adjusted", "q")} <= set(table)


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


def _rows(folder: Path, unit: str, category: str = "") -> list[dict[str, str]]:
    rows = csv.DictReader((folder / "top.csv").read_text().splitlines())
    return [row for row in rows if row["unit"] == unit and row.get("category", "") == category]


def _mixed() -> list[jm.PromptPair]:
    """Eight pairs of category "left" and seven of "right"."""
    asks = [("how to harm", "how to help"), ("do a", "do b"), ("why is it bad", "why is it fun")]
    return [
        jm.PromptPair(f"{n}", f"{n} {asks[n % 3][0]}", f"{n} {asks[n % 3][1]}", ("S",), ("N",), category="left" if n < 8 else "right")
        for n in range(15)
    ]


@pytest.fixture(scope="module")
def mixed(plain_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the head (1, 2) does much for one category, and nothing for the other."""
    from jaxmed.effects.summary import summarise

    out = tmp_path_factory.mktemp("mixed") / "run"
    table = jm.sweep(plain_model, _mixed(), unit=("head_out", "mlp_out"), out=out, by="category")
    stored, written = table.head_out.values.copy(), Table(out)
    stored[:, 1, 2] = [*(5 + 0.1 * np.arange(8)), *(0.001 * np.arange(-3, 4))]
    for pair, effects in enumerate(stored):
        written.write([("head_out", {"pair": pair, "layer": layer}, row) for layer, row in enumerate(effects)])
    summarise(out, plain_model, by="category")
    return out


def test_a_unit_that_does_nothing_for_one_category_is_seen(mixed: Path) -> None:
    row = next(row for row in _rows(mixed, "head_out") if (row["layer"], row["index"]) == ("1", "2"))
    assert row["weakest_category"] == "right"
    assert abs(float(row["weakest_mean"])) < 0.01 < 1 < float(row["mean"])
    left = _rows(mixed, "head_out", "left")
    assert (left[0]["layer"], left[0]["index"]) == ("1", "2")
    at = next(int(row["rank"]) for row in _rows(mixed, "head_out", "right") if (row["layer"], row["index"]) == ("1", "2"))
    assert at > 3
    assert "head_out, category right" in write_report([mixed], mixed / "page.html").read_text()


def test_statistics_of_a_category_are_those_of_its_pairs_alone(plain_model: Model, mixed: Path, tmp_path: Path) -> None:
    table = jm.open_results(mixed)
    assert table.mlp_out_by_category_mean.attrs["by_category"] == ["left", "right"]
    for number, name in enumerate(("left", "right")):
        alone = jm.sweep(plain_model, [pair for pair in _mixed() if pair.category == name], unit="mlp_out", out=tmp_path / name)
        for field in ("mean", "ci_low", "t", "p", "p_adjusted", "q"):
            of_part, whole = table[f"mlp_out_by_category_{field}"].values[number], alone[f"mlp_out_{field}"].values
            np.testing.assert_allclose(of_part, whole, rtol=1e-3, atol=1e-5)
        assert [row["layer"] for row in _rows(mixed, "mlp_out", name)] == [row["layer"] for row in _rows(tmp_path / name, "mlp_out")]


def test_the_first_unit_is_not_one_that_its_test_refutes(mixed: Path) -> None:
    for unit in ("head_out", "mlp_out"):
        rows = _rows(mixed, unit)
        assert [abs(float(row["t"])) for row in rows] == sorted((abs(float(row["t"])) for row in rows), reverse=True)
        adjusted = [float(row["p_adjusted"]) for row in rows]
        assert adjusted == sorted(adjusted)
        assert all(float(row["p"]) <= of for row, of in zip(rows, adjusted, strict=True))


def test_both_p_values_have_their_names_everywhere(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show.top_units(mixed, "|t|")
    said, page = capsys.readouterr().out, write_report([mixed], mixed / "page.html").read_text()
    for text in ("head_out: largest |t|", "mlp_out, category left", "weakest", " p ", "p_adjusted"):
        assert text in said
    assert "Ranked by |t|" in page
    assert "<th>p</th><th>p_adjusted</th>" in page


def test_a_sweep_without_categories_is_not_split(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="nothing to split by"):
        jm.sweep(plain_model, [jm.PromptPair("a", "do a", "do b", ("S",), ("N",))], unit="mlp_out", by="category")
    with pytest.raises(jm.UserError, match="'group'"):
        jm.sweep(plain_model, tiny.PAIRS, unit="mlp_out", by="group")


def test_columns_whose_numbers_are_all_zero_stay_in_the_table(tmp_path: Path) -> None:
    write_top(tmp_path, [{"rank": 1, "unit": "mlp_out", "layer": 0, "weakest_category": "x", "weakest_mean": 0.0, "category": ""}])
    (row,) = read_csv(tmp_path / "top.csv")
    assert (row["weakest_category"], row["weakest_mean"]) == ("x", "0.0")
    assert "category" not in row
