"""The exact engine equals naive full-forward patching: unit x position x outcome, over every kind of block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.mediators import MEDIATORS, units_of
from jaxmed.models.model import Model
from tests import naive, tiny, tolerances

WINDOW = 7
FIRST_TOKEN = ("log-odds", "logprob", "kl")
TEXTS = ("prefix-gap", "sequence-logprob")


def _sampled(model: Model, unit: str, count: int, seed: int = 0) -> list[tuple[int, int]]:
    every = [(layer, index) for layer in range(model.config.layers) for index in range(MEDIATORS[unit].count(model.config, WINDOW))]
    chosen = np.random.default_rng(seed).permutation(len(every))[:count]
    return [every[i] for i in sorted(chosen)]


def _compare(model: Model, pairs: tuple[jm.PromptPair, ...], position: str | int, outcomes: tuple[str, ...], count: int) -> None:
    table = jm.sweep(model, pairs, outcomes, units_of(model.config), position, WINDOW)
    worst = largest = 0.0
    for pair in pairs:
        for unit in units_of(model.config):
            for layer, index in _sampled(model, unit, count):
                for name in outcomes:
                    at = {"pair": pair.id, "layer": layer} | ({"outcome": name} if len(outcomes) > 1 else {})
                    if MEDIATORS[unit].coordinate:
                        at[MEDIATORS[unit].coordinate] = index
                    found = np.atleast_1d(table[unit].sel(at).values)
                    wanted = np.asarray(naive.effects(model, pair, position, unit, layer, index, name, WINDOW))
                    assert np.isnan(found[: -len(wanted)]).all()
                    worst = max(worst, float(np.abs(found[-len(wanted) :] - wanted).max()))
                    largest = max(largest, float(np.abs(wanted).max()))
    assert worst <= tolerances.EFFECTS
    assert largest > 100 * tolerances.EFFECTS, "the compared effects are too small to tell anything"


@pytest.mark.parametrize("position", ["user_last", *(pytest.param(p, marks=pytest.mark.slow) for p in ("last", -3))])
def test_engine_equals_naive_for_first_token_outcomes(tiny_model: Model, position: str | int) -> None:
    _compare(tiny_model, tiny.PAIRS[1:2], position, FIRST_TOKEN, 3)


@pytest.mark.slow
@pytest.mark.parametrize("position", [pytest.param("last", marks=pytest.mark.slow), "user_last"])
def test_engine_equals_naive_for_answers_of_several_tokens(tiny_model: Model, position: str) -> None:
    _compare(tiny_model, tiny.LONG[1:2], position, TEXTS, 2)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["all", "user", 11])
def test_engine_equals_naive_for_spans_of_equal_prompts(tiny_model: Model, position: str | int) -> None:
    _compare(tiny_model, tiny.PAIRS[:1], position, ("log-odds",), 3)


@pytest.mark.slow
def test_engine_equals_naive_at_each_position_of_unequal_prompts(tiny_model: Model) -> None:
    _compare(tiny_model, tiny.PAIRS[1:3], "each", ("log-odds",), 1)


@pytest.mark.parametrize("position", ["all", *(pytest.param(p, marks=pytest.mark.slow) for p in ("last", "<a>"))])
def test_engine_equals_naive_on_the_plain_block(plain_model: Model, position: str) -> None:
    _compare(plain_model, tiny.PAIRS[:1], position, ("log-odds",), 3)


@pytest.mark.slow
def test_each_position_with_answers_of_several_tokens(plain_model: Model) -> None:
    _compare(plain_model, tiny.LONG[2:], "each", ("prefix-gap", "sequence-logprob"), 1)


def test_python_outcome_equals_the_built_in_one(plain_model: Model) -> None:
    ids = [plain_model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("S", "N")]

    def difference(logits):
        return logits[ids[0]] - logits[ids[1]]

    pair = jm.PromptPair("p", "how to harm", "how to help", ("S",), ("N",))
    table = jm.sweep(plain_model, [pair], ("logit-diff", difference))
    values = table.neuron.transpose("outcome", ...).values
    assert np.abs(values[0] - values[1]).max() <= tolerances.EFFECTS
    assert list(table.outcome.values) == ["logit-diff", "difference"]


def test_several_chunks_equal_one(plain_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jm.sweep(plain_model, tiny.PAIRS[:1], unit=tuple(MEDIATORS), window=WINDOW)
    monkeypatch.setattr("jaxmed.effects.job.units_per_device", lambda *_, **__: 5)
    pieces = jm.sweep(plain_model, tiny.PAIRS[:1], unit=tuple(MEDIATORS), window=WINDOW)
    for unit in MEDIATORS:
        assert np.abs(whole[unit].values - pieces[unit].values).max() <= tolerances.EFFECTS


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=2", "data=2"])
def test_meshes_agree(mesh: str) -> None:
    alone = jm.sweep(tiny.model("llama", mesh="data=1"), tiny.PAIRS[:1], unit=tuple(MEDIATORS), window=WINDOW)
    shared = jm.sweep(tiny.model("llama", mesh=mesh), tiny.PAIRS[:1], unit=tuple(MEDIATORS), window=WINDOW)
    for unit in MEDIATORS:
        assert np.abs(alone[unit].values - shared[unit].values).max() <= tolerances.EFFECTS


def test_bfloat16_effects_follow_float32(plain_model: Model) -> None:
    narrow = jm.sweep(tiny.model("llama", dtype="bfloat16"), tiny.PAIRS[:1], unit="mlp_out").mlp_out.values
    wide = jm.sweep(plain_model, tiny.PAIRS[:1], unit="mlp_out").mlp_out.values
    assert np.corrcoef(narrow.ravel(), wide.ravel())[0, 1] > 0.98


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (lambda logits: logits, r"returns float32 \[264\]"),
        (lambda logits: float(logits[0]), r"without float\(\)"),
        (lambda logits: logits[0] if logits[0] > logits[1] else logits[1], "without float"),
        (lambda logits: logits[0] > logits[1], "returns bool"),
        (lambda logits, other: other, "TypeError"),
        (lambda logits: (logits[0], logits[1]), "returns tuple"),
        (lambda logits: np.asarray(logits)[0], "without float"),
    ],
)
def test_functions_that_are_no_outcomes_are_refused_before_anything_runs(plain_model: Model, outcome: Any, said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        jm.sweep(plain_model, tiny.PAIRS[:1], outcome=outcome, unit="mlp_out")
