"""GradDrop: against runs in which a layer adds what it adds in the base run, whatever it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.cost import plan
from jaxmed.effects.job import make_job
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.request import Request
from jaxmed.interventions.edits import Edit
from jaxmed.models.model import Model
from jaxmed.tokens import align, render
from tests import naive, tiny

MODULES = ("attention_out", "mlp_out")


def _slow(model: Model, pair: jm.PromptPair, unit: str, position: str) -> np.ndarray:
    """Mean absolute first-order effects of every layer's units [L,count] on log-odds, a full forward and its gradient for each layer
    that is held: its attention and MLP outputs are written over with their own values, which nothing can move."""
    ids, sites, layers = render(model.tokenizer, pair, "base").ids, MEDIATORS[unit].sites, model.config.layers
    (patch,) = align(render(model.tokenizer, pair, "base"), render(model.tokenizer, pair, "source"), position)
    padded, moving = naive._padded(ids), naive.moving(model, pair, patch, sites)
    entry = sites[0] if len(sites) == 1 else "residual_out"
    taps = jm.forward(model, padded, taps=(*MODULES, entry))[1]
    answers = [[model.tokenizer(text)["input_ids"][0] for text in texts] for texts in (pair.target, pair.foil)]

    def outcome(moved: jax.Array, held: jax.Array) -> jax.Array:
        edits = {}
        for site in dict.fromkeys((*MODULES, entry)):
            shape = taps[site].shape
            holds = held.reshape(-1, *(1,) * (len(shape) - 1)) * float(site in MODULES)
            add = moved * moving if site == entry else jnp.zeros(shape)
            edits[site] = Edit(jnp.broadcast_to(holds, shape), taps[site], add)
        logits = jm.forward(model, padded, edits)[0][0, len(ids) - 1]
        target, foil = (jax.nn.logsumexp(logits[jnp.asarray(texts)]) for texts in answers)
        return target - foil

    slope: Any = jax.jit(jax.grad(outcome))
    total = np.zeros((layers, MEDIATORS[unit].count(model.config, 4)))
    for dropped in range(layers):
        slopes = np.asarray(slope(np.zeros(moving.shape, np.float32), (np.arange(layers) == dropped).astype(np.float32)))
        for layer in set(range(layers)) - {dropped}:
            total[layer] += np.abs(naive.by_unit(model, unit, slopes[layer], 4)) / (layers - 1)
    return total


@pytest.mark.parametrize("kind", ["llama", pytest.param("post_norm", marks=pytest.mark.slow)])
def test_values_are_means_over_runs_that_hold_a_layer(kind: str) -> None:
    model, units, pair = tiny.model(kind), ("neuron", "head_out", "both_out"), tiny.PAIRS[1]
    how: dict[str, Any] = {"unit": units, "position": "user_last", "window": 4}
    star, plain = (jm.sweep(model, [pair], method=method, **how) for method in ("attribution-star", "attribution"))
    part = jm.sweep(model, [pair], method="attribution-star", layers=(1, 2), **how)
    for unit in units:
        wanted = _slow(model, pair, unit, "user_last")
        found = star[f"{unit}_graddrop"].values[0].reshape(wanted.shape)
        assert np.abs(found - wanted).max() <= 1e-4 * wanted.max(), unit
        assert np.abs(star[unit].values - plain[unit].values).max() <= 1e-5, unit
        assert np.allclose(part[f"{unit}_graddrop"].values[0, 1:], star[f"{unit}_graddrop"].values[0, 1:], atol=1e-5), unit


def test_it_has_a_variable_of_its_own_and_no_statistics(plain_model: Model, tmp_path: Path) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS, unit="mlp_out", position="each", method="attribution-star", out=tmp_path / "run")
    assert table.mlp_out_graddrop.dims == table.mlp_out.dims
    assert np.isnan(table.mlp_out_graddrop.values).tolist() == np.isnan(table.mlp_out.values).tolist()
    assert float(table.mlp_out_graddrop.min()) >= 0
    assert "no sign" in table.mlp_out_graddrop.attrs["formula"]
    assert "mlp_out_mean" in table
    assert "mlp_out_graddrop_mean" not in table
    assert "graddrop" not in (tmp_path / "run" / "top.csv").read_text()


def test_the_plan_counts_a_backward_for_every_layer(plain_model: Model) -> None:
    plans = [plan(make_job(plain_model, tiny.PAIRS, Request(method=one))).cost for one in ("attribution", "attribution-star")]
    assert plans[1].passes - plans[0].passes == pytest.approx(plans[0].passes * (plain_model.config.layers - 1) / 3)
