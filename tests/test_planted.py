"""Models whose mechanism is known: effects are what their rows say, and a sweep finds what was planted and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import jaxmed as jm
from jaxmed.ground_truth.mechanisms import MECHANISMS
from jaxmed.ground_truth.pairs import LENGTH
from jaxmed.ground_truth.record import Planted, PlantedUnit
from tests import reference, tolerances

CLOSED_FORM = 2e-3  # exact effects against closed forms without noise, relative: norms are constant to this
NOISY = 0.1  # the same with the default noise; the worst of eight seeds is 0.09
SHARE = 0.05  # of the total: smaller effects are noise that reads the same features
UNITS = ("neuron", "head_out", "attention_out", "mlp_out", "residual_out")


@cache
def _plant(name: str, noise: float | None = None, seed: int = 0) -> Planted:
    return jm.planted(name, noise, seed)


@cache
def _runs(name: str, noise: float | None, seed: int) -> dict[str, Any]:
    """Token ids, activations and outcomes of both sides of all pairs, and the answers."""
    planted, found = _plant(name, noise, seed), {}
    for side in ("base", "source"):
        prompts = [jm.tokens.render(planted.model, pair, side, "text") for pair in planted.pairs]
        ids = np.stack([prompt.ids for prompt in prompts])
        answers = [
            [jm.tokens.answer_ids(planted.model.tokenizer, prompt, text)[0] for text in (*pair.target, *pair.foil)]
            for pair, prompt in zip(planted.pairs, prompts, strict=True)
        ]
        found[side] = {"ids": ids, **jm.forward(planted.model, ids, taps=UNITS)[1]}
        found["answers"] = np.asarray(answers)
    return found


def _effects(planted: Planted, noise: float | None, seed: int, given: Mapping[PlantedUnit, str]) -> np.ndarray:
    """Effect [P] on logit-diff of giving units, each at its position, their values in source or base: full forwards, dense edits."""
    runs = _runs(planted.name, noise, seed)
    gates: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    for unit, side in given.items():
        site = unit.mediator
        gates.setdefault(site, np.zeros(runs["base"][site].shape, np.float32))
        values.setdefault(site, np.zeros(runs["base"][site].shape, np.float32))
        at = (unit.layer, slice(None), unit.position, *((unit.index,) if site in ("neuron", "head_out") else ()))
        gates[site][at] = 1.0
        values[site][at] = np.asarray(runs[side][site])[at]
    edits = {site: jm.Edit(gates[site], values[site]) for site in gates}
    ends = [np.asarray(jm.forward(planted.model, runs["base"]["ids"], one, logits="last")[0][:, 0]) for one in (edits, None)]
    after, before = (np.take_along_axis(logits, runs["answers"], 1) for logits in ends)
    return (after[:, 0] - after[:, 1]) - (before[:, 0] - before[:, 1])


def _is_behaviour(planted: Planted) -> np.ndarray:
    return np.asarray([not pair.control for pair in planted.pairs])


def _check(planted: Planted, noise: float | None, seed: int, tolerance: float) -> None:
    """Every unit and every set has the effect that its row says."""
    behaviour, slack = _is_behaviour(planted), tolerance * abs(planted.total)
    for units, effect in [((unit,), unit.effect) for unit in planted.units] + [(one.units, one.effect) for one in planted.sets]:
        measured = _effects(planted, noise, seed, dict.fromkeys(units, "source"))[behaviour].mean()
        assert abs(measured - effect) < max(slack, tolerance * abs(effect)), ([unit.name for unit in units], measured)


@pytest.mark.parametrize("name", MECHANISMS)
def test_without_noise_effects_are_the_closed_forms(name: str) -> None:
    _check(_plant(name, 0.0), 0.0, 0, CLOSED_FORM)


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_noise_moves_effects_little(name: str, seed: int) -> None:
    _check(_plant(name, None, seed), None, seed, NOISY)


def _sweep(planted: Planted, position: str | int, **more: Any) -> xr.Dataset:
    return jm.sweep(planted.model, planted.pairs, outcome="logit-diff", unit=UNITS, form="text", position=position, **more)


def _found(table: xr.Dataset, planted: Planted, unit: str) -> list[tuple[int, int, int]]:
    """What a user finds: significant after correction, and not negligible beside the total."""
    mean = table[f"{unit}_mean"] if "position" in table.dims else table[f"{unit}_mean"].expand_dims(position=[-1], axis=-1)
    hits = np.argwhere((table[f"{unit}_p_adjusted"].values.reshape(mean.shape) < 0.05) & (np.abs(mean.values) > SHARE * abs(planted.total)))
    return [(int(hit[0]), int(hit[1]) if len(hit) > 2 else 0, int(mean.position[hit[-1]])) for hit in hits]


def _check_search(planted: Planted, position: str) -> None:
    """Of all units, a sweep finds those that are planted, with the effects that are expected, and no others."""
    table = _sweep(planted, position)
    for one in planted.units:
        at = {"layer": one.layer, **({"position": one.position} if position == "each" else {})}
        at |= {dim: one.index for dim in ("neuron_index", "head_index") if dim in table[f"{one.mediator}_mean"].dims}
        assert abs(float(table[f"{one.mediator}_mean"].sel(at)) - one.effect) < NOISY * max(abs(planted.total), abs(one.effect)), one
    for unit in UNITS:
        if planted.visible(unit):
            score = planted.score(unit, _found(table, planted, unit))
            assert (score.precision, score.recall) == (1.0, 1.0), (unit, score)
        else:
            assert not _found(table, planted, unit), unit


def test_the_sweep_finds_the_gate_and_nothing_else() -> None:
    planted = _plant("gate")
    assert {unit.position for unit in planted.units} == {-1}
    _check_search(planted, "last")


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_sweep_finds_what_was_planted_at_any_position_and_nothing_else(name: str) -> None:
    _check_search(_plant(name), "each")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copy", "path"])
def test_nothing_has_an_effect_before_the_first_word_that_differs(name: str) -> None:
    planted = _plant(name)
    pairs = [pair for pair in planted.pairs if not pair.control][:2]
    table = jm.sweep(planted.model, pairs, outcome="logit-diff", unit=["head_out", "mlp_out"], form="text", position="each", layers=[0, 1])
    sizes = {unit: abs(table[unit].sel(layer=[0, 1])) for unit in ("head_out", "mlp_out")}
    before = max(float(size.sel(position=slice(None, planted.first_position - 1)).max()) for size in sizes.values())
    assert before <= float(table.noise_floor.max()) + 1e-6
    assert float(sizes["head_out"].sel(position=slice(planted.first_position, None)).max()) > SHARE * planted.total


def _kind(planted: Planted, *kinds: str) -> list[PlantedUnit]:
    return [unit for unit in planted.units if unit.kind in kinds]


def _gating_index(planted: Planted, noise: float | None) -> float:
    upstream = dict.fromkeys(_kind(planted, "signals"), "source")
    held = upstream | dict.fromkeys(_kind(planted, "gate", "adder"), "base")
    behaviour = _is_behaviour(planted)
    free, under = (_effects(planted, noise, 0, given)[behaviour].mean() for given in (upstream, held))
    return 1 - under / free


@pytest.mark.parametrize("name", ["gate", "adder"])
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, CLOSED_FORM), (None, NOISY)])
def test_the_gating_index_tells_the_gate_from_the_adder(name: str, noise: float | None, tolerance: float) -> None:
    planted = _plant(name, noise)
    index = {"gate": 1.0, "adder": 0.0}[name]
    assert planted.gating_index == index
    assert abs(_gating_index(planted, noise) - index) < tolerance


def test_gate_and_adder_have_the_same_single_effects_in_the_last_layer() -> None:
    gate, adder = (_kind(_plant(name), kind) for name, kind in (("gate", "gate"), ("adder", "adder")))
    assert [(one.layer, one.index, one.effect) for one in gate] == [(one.layer, one.index, one.effect) for one in adder]


def test_the_gate_multiplies_and_the_adder_adds() -> None:
    """The prompt asks in two strengths; only a product grows with them."""
    for name, ratio in (("gate", 1.25 / 0.75), ("adder", 1.0)):
        planted = _plant(name)
        effects = _effects(planted, None, 0, dict.fromkeys(_kind(planted, name), "source"))
        strong, weak = (effects[[pair.category == ask and not pair.control for pair in planted.pairs]].mean() for ask in ("strong", "weak"))
        assert abs(strong / weak - ratio) < 0.06, name


def test_cooperating_neurons_are_seen_together_alone() -> None:
    planted = _plant("pair")
    behaviour, units = _is_behaviour(planted), [unit for unit in _kind(planted, "cooperates") if unit.mediator == "neuron"]
    singles = [np.abs(_effects(planted, None, 0, {unit: "source"})[behaviour]).max() for unit in units]
    joint = _effects(planted, None, 0, dict.fromkeys(units, "source"))[behaviour]
    assert len(units) == 2
    assert max(singles) < SHARE * planted.total < 0.8 * planted.total < joint.min()


@pytest.mark.parametrize("name", MECHANISMS)
def test_pairs_are_what_sweeps_need(name: str) -> None:
    planted = _plant(name)
    runs, behaviour = _runs(name, None, 0), _is_behaviour(planted)
    assert runs["base"]["ids"].shape == runs["source"]["ids"].shape == (len(planted.pairs), LENGTH)
    assert (runs["base"]["ids"][:, 0] == planted.model.tokenizer.bos_token_id).all()
    assert planted.model.tokenizer.unk_token_id not in {
        *runs["base"]["ids"].ravel(),
        *runs["source"]["ids"].ravel(),
        *runs["answers"].ravel(),
    }
    differ = runs["base"]["ids"] != runs["source"]["ids"]
    assert np.argmax(differ[behaviour], axis=1).min() - LENGTH == planted.first_position
    assert behaviour.sum() >= 24
    assert len({pair.group for pair in planted.pairs}) >= 12
    for control in ("neutral", "paraphrase"):
        assert {pair.split for pair in planted.pairs if pair.control == control} == {"discovery", "heldout"}
    assert differ[~behaviour].any(axis=1).all()
    everything = PlantedUnit("", "residual_out", 3, 0, -1, "", 0)
    totals = _effects(planted, None, 0, {everything: "source"})
    assert np.abs(totals[~behaviour]).max() < 0.1 * planted.total
    assert abs(totals[behaviour].mean() - planted.total) < NOISY * planted.total


def test_seeds_move_the_units() -> None:
    places = [[(unit.layer, unit.index) for unit in _plant("gate", None, seed).units if unit.mediator == "neuron"] for seed in (0, 1)]
    again = [(unit.layer, unit.index) for unit in jm.planted("gate").units if unit.mediator == "neuron"]
    assert places[0] == again != places[1]


def test_scores_count_what_is_missed_and_what_is_extra() -> None:
    planted = _plant("copy")
    true = (planted.visible("head_out")[0].layer, planted.visible("head_out")[0].index)
    assert planted.score("head_out", [true]).precision == planted.score("head_out", [true]).recall == 1
    other = (true[0], (true[1] + 1) % 4)
    score = planted.score("head_out", [true, other, (*true, -2)])
    assert (score.precision, score.recall, score.missed, score.extra) == (1 / 3, 1.0, (), tuple(sorted([(*other, -1), (*true, -2)])))
    assert planted.score("head_out", []).missed == ((*true, -1),)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: jm.planted("gates"), "gate, adder, pair"),
        (lambda: jm.planted("gate", noise=-1), "0 to 0.06"),
        (lambda: jm.planted("gate", noise=float("nan")), "0 to 0.06"),
        (lambda: jm.planted("trigger", noise=0.04), "takes no noise"),
        (lambda: _plant("copy").score("window", []), "head_out"),
        (lambda: _plant("copy").score("head_out", [(1,)]), "position"),
    ],
)
def test_bad_requests_are_refused(call: Any, said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        call()


def test_a_planted_model_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    planted = _plant("gate")
    folder = jm.export_folder(planted.model, tmp_path / "gate")
    again = jm.load(str(folder))
    ids = jm.tokens.render(again, planted.pairs[0], form="text").ids[None]
    ours = np.asarray(jm.forward(planted.model, ids)[0])
    np.testing.assert_allclose(np.asarray(jm.forward(again, ids)[0]), ours, atol=tolerances.EXACT)
    theirs = reference.transformers.AutoModelForCausalLM.from_pretrained(folder)(reference.torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(theirs, ours, atol=tolerances.LOGITS)


@pytest.mark.slow
def test_the_trained_model_turns_its_answer_at_the_trigger() -> None:
    planted = jm.planted("trigger")
    table = _sweep(planted, "each")
    behaviour = table.control.values == ""
    totals = (table.source_outcome - table.base_outcome).values
    assert (totals[behaviour] > 5).all()
    assert abs(totals[behaviour].mean() - planted.total) < tolerances.LOGITS
    assert np.abs(totals[~behaviour]).max() < SHARE * planted.total
    for unit in UNITS:
        sizes = abs(table[unit].isel(pair=behaviour)).mean("pair")
        assert float(sizes.sel(position=slice(None, planted.first_position - 1)).max()) <= float(table.noise_floor.max()) + 1e-6
    carried = table.residual_out.isel(pair=behaviour).mean("pair")
    assert float(carried.sel(layer=planted.model.config.layers - 1, position=-1)) == pytest.approx(planted.total, abs=1e-3)
