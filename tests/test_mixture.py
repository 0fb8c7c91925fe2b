"""Mixtures of experts in result tables: where a neuron is, and how nearly its routing was tied."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import xarray as xr

import jaxmed as jm
from jaxmed import results
from jaxmed.effects.mediators import EXPERT
from jaxmed.models.model import Model
from jaxmed.reports.cautions import cautions
from jaxmed.reports.record import read
from jaxmed.reports.tables import top_tables
from jaxmed.runs.folder import read_run
from jaxmed.tokens import align, render
from tests import naive, tiny, tolerances

PAIRS, POSITION, OUTCOME = tiny.LONG[1:], "user_last", "prefix-gap"
UNITS = ("neuron", "mlp_out")
SETTINGS: dict[str, Any] = {"outcome": OUTCOME, "unit": UNITS, "position": POSITION}


@pytest.fixture(scope="module")
def mixture() -> Model:
    """A random mixture: four experts of eight neurons, two of them used by every token."""
    return tiny.model("mixture")


@pytest.fixture(scope="module")
def folder(mixture: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of the mixture."""
    out = tmp_path_factory.mktemp("mixture") / "run"
    jm.sweep(mixture, PAIRS, **SETTINGS, out=out)
    return out


@pytest.fixture(scope="module")
def table(folder: Path) -> xr.Dataset:
    return results.open_results(folder).load()


def tied(model: Model, layer: int) -> Model:
    """The same mixture with a router, in one layer, that scores all experts alike."""
    blocks = model.params["blocks"]
    router = blocks["router"].at[layer].set(blocks["router"][layer, :, :1])
    return replace(model, params={**model.params, "blocks": {**blocks, "router": router}})


def leads(model: Model, ids: np.ndarray) -> np.ndarray:
    """Lead of the second over the third router logit, float [L,T], from residual_mid and the weights in float64."""
    padded = np.pad(ids, (0, naive.LENGTH - len(ids)))
    h = np.asarray(jm.forward(model, padded, taps=("residual_mid",))[1]["residual_mid"], np.float64)[:, 0, : len(ids)]
    blocks = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params["blocks"])
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + model.config.norm_eps) * blocks["mlp_norm"][:, None]
    ranked = np.sort(normed @ blocks["router"], axis=-1)
    return ranked[..., -2] - ranked[..., -3]


def least_lead(model: Model, pair: jm.PromptPair) -> np.ndarray:
    """What `routing_margin` must hold for a pair, float [L]: every answer in a run of its own."""
    base, source = (render(model.tokenizer, pair, side) for side in ("base", "source"))
    patch = align(base, source, POSITION)[0]
    texts = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*pair.target, *pair.foil)]
    runs = [leads(model, np.concatenate([base.ids, text[:-1]]).astype(int))[:, patch.base[0] :] for text in texts]
    return np.concatenate([*runs, leads(model, source.ids)[:, list(patch.source)]], axis=1).min(axis=1)


def test_neurons_say_which_expert_they_are_of(table: xr.Dataset) -> None:
    assert [table[name].dims for name in EXPERT] == [("neuron_index",)] * 2
    assert np.array_equal(table.expert, np.repeat(np.arange(4), 8))
    assert np.array_equal(8 * table.expert + table.expert_neuron, table.neuron_index)
    assert table.neuron.sel(neuron_index=table.expert == 2).sizes["neuron_index"] == 8


def test_top_csv_and_the_page_say_it_too(folder: Path) -> None:
    rows = list(csv.DictReader((folder / results.TOP).read_text().splitlines()))
    for row in rows:
        where = [row[name] for name in EXPERT]
        assert where == ([str(part) for part in divmod(int(row["index"]), 8)] if row["unit"] == "neuron" else ["", ""])
    neurons, *others = top_tables(read(folder))
    shown = neurons.rows[0][neurons.columns.index("expert")]
    assert shown == f"expert {rows[0]['expert']}, neuron {rows[0]['expert_neuron']}"
    assert all("expert" not in other.columns for other in others)


def test_the_margin_equals_one_computed_from_the_weights(mixture: Model, table: xr.Dataset) -> None:
    wanted = np.stack([least_lead(mixture, pair) for pair in PAIRS])
    assert table.routing_margin.dims == ("pair", "layer")
    assert table.routing_margin.dtype == np.float32
    assert np.abs(table.routing_margin.values - wanted).max() <= tolerances.TINY_LOGITS


def test_engine_equals_naive(mixture: Model, table: xr.Dataset) -> None:
    """At the largest effect of the first two layers, and at one more neuron."""
    effects, largest = table.neuron.values[0], np.abs(table.neuron.values[0]).argmax(axis=1)
    for layer, neuron in ((0, largest[0]), (1, largest[1]), (1, 13)):
        wanted = naive.effects(mixture, PAIRS[0], POSITION, "neuron", layer, int(neuron), OUTCOME, 1)[0]
        assert abs(effects[layer, neuron] - wanted) <= tolerances.EFFECTS
    assert np.abs(effects[0, largest[0]]) > 100 * tolerances.EFFECTS, "the compared effects are too small to tell anything"


def test_an_interrupted_run_resumes_to_the_same_table(mixture: Model, table: xr.Dataset, tmp_path: Path) -> None:
    def interrupt(work: float, count: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jm.sweep(mixture, PAIRS, **SETTINGS, out=tmp_path, watch=interrupt)
    cut = results.open_results(tmp_path).load()
    assert np.array_equal(cut.routing_margin[0], table.routing_margin[0])
    assert np.isnan(cut.routing_margin[1]).all()
    assert "near_tied_routing" not in read_run(tmp_path)
    assert jm.sweep(mixture, PAIRS, **SETTINGS, out=tmp_path, resume=True).identical(table)


def test_near_ties_are_said(mixture: Model, folder: Path, tmp_path: Path) -> None:
    jm.sweep(tied(mixture, 1), PAIRS, **SETTINGS, out=tmp_path)
    assert read_run(tmp_path)["near_tied_routing"] == {"chunks": 2, "of": 6, "margin_below": 1e-3}
    said = [caution for caution in cautions(read(tmp_path)) if "Near-tied routing in 2 of 6 (pair, layer)" in caution.text]
    assert [caution.serious for caution in said] == [True]
    assert read_run(folder)["near_tied_routing"]["chunks"] == 0
    assert not [caution for caution in cautions(read(folder)) if "routing" in caution.text]


@pytest.mark.parametrize("window", [3, 16, 32])
def test_windows_do_not_straddle_experts(mixture: Model, window: int) -> None:
    with pytest.raises(jm.UserError, match=rf"--window {window} would straddle experts.* 8 neurons each\. Legal: 1, 2, 4, 8\."):
        jm.sweep(mixture, PAIRS, unit="window", window=window)


def test_dense_models_have_none_of_this(plain_model: Model, tmp_path: Path) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path)
    assert not {*EXPERT, "routing_margin"} & {*table.variables}
    header = (tmp_path / results.TOP).read_text().splitlines()[0].split(",")
    assert not {*EXPERT} & {*header}
    assert "near_tied_routing" not in read_run(tmp_path)
    record = read(tmp_path)
    assert not [caution for caution in cautions(record) if "routing" in caution.text]
    assert all("expert" not in each.columns for each in top_tables(record))
