"""Restarted runs carry edits and taps: joint sets across layers, paths, and continuations of cached prompts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.engine import open_window, prepare
from jaxmed.effects.mediators import MEDIATORS, patched_rows
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Picks
from jaxmed.interventions.edits import TokenIndex, merge
from jaxmed.models.model import Model
from jaxmed.runner import Entry, Layout, Prefix, Recording, extend, logits_of, propagate, run, run_tokens
from tests import naive, tiny, tolerances

OUTCOME = ("log-odds",)
SITES = ("neuron", "mlp_out", "attention_out", "head_out")


def _ready(model: Model, position: str | int = "last") -> Any:
    prepared = prepare(make_contrast(model, tiny.PAIRS[0], Reading("pair", position, "chat", OUTCOME)), OUTCOME, SITES)
    window = open_window(prepared, prepared.contrast.patches[0])
    patch = prepared.contrast.patches[0]
    source = jm.forward(model, prepared.contrast.source.ids, taps=SITES)[1]
    values = {site: np.asarray(source[site])[:, 0, list(patch.source)] for site in SITES}
    return prepared, window, patch, values


def _propagate(model: Model, window: Any, rows: Any, first: int, *how: Any) -> Any:
    reads = window.reads
    return propagate(model.config, model.params, window.restart, rows, np.int32(first), reads, Readout(OUTCOME, 1), reads.slots, *how)


def _one(name: str, model: Model, values: Any, patch: Any, layer: int, index: int) -> dict[str, jm.Edit]:
    """A unit's edit, on row 0."""
    picks = Picks(np.zeros(1, int), np.asarray([layer]), np.asarray([index]))
    return MEDIATORS[name].edits(model.config, values, np.asarray(patch.base), picks, 1)


@pytest.mark.parametrize("kind", ["llama", pytest.param("post_norm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("position", ["last", "all"])
def test_a_joint_set_across_layers_equals_a_full_forward_with_all_its_edits(kind: str, position: str) -> None:
    """The first layer's member enters as a vector, the later ones as edits; single effects do not add up to the joint one."""
    model = tiny.model(kind)
    _, window, patch, values = _ready(model, position)
    members = [("neuron", 0, 3), ("head_out", 1, 2), ("neuron", 1, 5), ("mlp_out", 2, 0)]
    picks = Picks(np.zeros(1, int), np.zeros(1, int), np.asarray([3]))
    rows, mid = patched_rows(model.config, model.params, window.view, picks, ("neuron",), 1)
    later = merge(*(_one(name, model, values, patch, layer, index) for name, layer, index in members[1:]))
    entry = Entry(rows, np.zeros(1, np.int32), mid)
    found = _propagate(model, window, rows, 0, entry, later)

    every = merge(*(_one(name, model, values, patch, layer, index) for name, layer, index in members))
    wanted = naive.outcome(model, tiny.PAIRS[0], "base", "log-odds", every)
    assert float(found[0, 0]) == pytest.approx(wanted, abs=tolerances.EFFECTS)
    first = naive.outcome(model, tiny.PAIRS[0], "base", "log-odds", _one(*members[0][:1], model, values, patch, *members[0][1:]))
    assert abs(wanted - first) > 100 * tolerances.EFFECTS


def test_rows_of_a_restarted_run_take_edits_of_their_own(plain_model: Model) -> None:
    prepared, window, patch, values = _ready(plain_model)
    rows = np.asarray(prepared.base["residual_out"])[0][None, window.view.slots].repeat(2, 0)
    edit = _one("neuron", plain_model, values, patch, 2, 4)
    found = _propagate(plain_model, window, rows, 1, None, edit)
    alone = [naive.outcome(plain_model, tiny.PAIRS[0], "base", "log-odds", edits) for edits in (edit, None)]
    assert np.abs(np.asarray(found)[0] - alone).max() <= tolerances.EFFECTS


def test_a_restarted_run_reads_what_a_full_forward_reads(plain_model: Model) -> None:
    """Path patching reads a receiver's input in the patched run."""
    _, window, patch, values = _ready(plain_model, "user_last")
    picks = Picks(np.zeros(1, int), np.zeros(1, int), np.asarray([3]))
    rows, _ = patched_rows(plain_model.config, plain_model.params, window.view, picks, ("neuron",), 1)
    taps = ("neuron", "residual_in")
    restart, first = window.restart, np.int32(1)
    ran = run(
        plain_model.config, plain_model.params, rows, restart.layout, Recording(taps), first=jnp.asarray(first), prefix=restart.prefix
    )
    base = make_contrast(plain_model, tiny.PAIRS[0], Reading("pair", "last", "chat", OUTCOME)).base.ids
    wanted = jm.forward(plain_model, base, _one("neuron", plain_model, values, patch, 0, 3), taps=taps)[1]
    for name in taps:
        found, whole = np.asarray(ran.taps[name])[1:, 0], np.asarray(wanted[name])[1:, 0, patch.base[0] :]
        assert np.abs(found[:, : whole.shape[1]] - whole).max() <= tolerances.EFFECTS
        assert not np.asarray(ran.taps[name])[0].any()


def test_continuations_of_cached_prompts_are_those_of_whole_texts(plain_model: Model) -> None:
    """Two prompts, three continuations of each: the prompts run once."""
    config, params, rng = plain_model.config, plain_model.params, np.random.default_rng(0)
    prompts, more = rng.integers(1, 200, (2, 9)), rng.integers(1, 200, (6, 4))
    layout = Layout(np.arange(9)[None], np.tril(np.ones((9, 9), bool))[None], TokenIndex(np.arange(9)[None], np.asarray([9])))
    kept = run_tokens(config, params, jnp.asarray(prompts), layout, Recording(keep=True)).kept
    assert kept is not None
    prefix = Prefix(*kept, np.tile(np.arange(9), (2, 1)), np.ones((2, 9), bool))
    behind = Layout(9 + np.arange(4)[None], np.tril(np.ones((4, 4), bool))[None], TokenIndex(9 + np.arange(4)[None], np.asarray([13])))
    ran = extend(config, params, jnp.asarray(more), behind, prefix)
    whole = jm.forward(plain_model, np.concatenate([prompts.repeat(3, 0), more], axis=1))[0]
    assert np.abs(np.asarray(logits_of(config, params, ran.stream)) - np.asarray(whole)[:, 9:]).max() <= tolerances.PADDED
