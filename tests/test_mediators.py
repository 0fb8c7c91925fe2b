"""Every mediator says its intervention twice, as vectors and as data: both leave the same residual stream."""

from __future__ import annotations

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.engine import open_window, prepare
from jaxmed.effects.mediators import MEDIATORS, patched_rows, units_of
from jaxmed.effects.rows import Picks
from jaxmed.models.model import Model
from tests import tiny, tolerances

WIDTH = 5
READING = Reading("pair", "user_last", "chat", ("log-odds",))


def _picks(model: Model, name: str, count: int = 6) -> Picks:
    rng = np.random.default_rng(len(name))
    index = rng.integers(0, MEDIATORS[name].count(model.config, WIDTH), count)
    return Picks(np.zeros(count, np.int32), rng.integers(0, model.config.layers, count).astype(np.int32), index.astype(np.int32))


@pytest.mark.parametrize("name", MEDIATORS)
@pytest.mark.parametrize("kind", ["post_norm", "mixture", *(pytest.param(k, marks=pytest.mark.slow) for k in ("llama", "windowed_biased"))])
def test_vectors_and_edits_leave_the_same_stream(kind: str, name: str) -> None:
    model, mediator = tiny.model(kind), MEDIATORS[name]
    if name not in units_of(model.config):
        pytest.skip("its MLP has no such branch")
    prepared = prepare(make_contrast(model, tiny.PAIRS[1], READING), ("log-odds",), (name,))
    contrast, picks, width = prepared.contrast, _picks(tiny.model(kind), name), mediator.width(WIDTH)
    patch = contrast.patches[0]
    window = open_window(prepared, patch)
    rows, mid = patched_rows(model.config, model.params, window.view, picks, (name,), width)

    source = jm.forward(model, contrast.source.ids, taps=mediator.sites)[1]
    values = {site: np.asarray(source[site])[:, 0, list(patch.source)] for site in mediator.sites}
    edits = mediator.edits(model.config, values, np.asarray(patch.base), picks, width)
    tokens = np.tile(contrast.base.ids, (len(picks.layer), 1))
    entries = ("residual_mid", "residual_out")
    taps = jm.forward(model, tokens, edits, taps=entries)[1]
    entry = entries[not mediator.mid]
    untouched, largest = np.asarray(jm.forward(model, tokens[:1], taps=entries)[1][entry]), 0.0
    for row, layer in enumerate(picks.layer):
        wanted = np.asarray(taps[entry])[layer, row, patch.base[0] :]
        assert bool(mid[row]) == mediator.mid
        assert np.abs(np.asarray(rows)[row, : len(wanted)] - wanted).max() <= tolerances.EFFECTS
        largest = max(largest, float(np.abs(wanted - untouched[layer, 0, patch.base[0] :]).max()))
    assert largest > 10 * tolerances.EFFECTS, "the patches change nothing"


def test_rows_without_a_unit_stay_at_base(plain_model: Model) -> None:
    prepared = prepare(make_contrast(plain_model, tiny.PAIRS[0], READING), ("log-odds",), ("neuron", "head_out"))
    window = open_window(prepared, prepared.contrast.patches[0])
    for name in ("neuron", "head_out"):
        picks = Picks(np.full(2, -1), np.asarray([0, 2]), np.zeros(2, int))
        rows, mid = patched_rows(plain_model.config, plain_model.params, window.view, picks, (name,), 1)
        stored = np.asarray(prepared.base["residual_out"])[[0, 2]][:, window.view.slots]
        assert np.abs(np.asarray(rows) - stored).max() <= 1e-6
        assert not np.asarray(mid).any()
