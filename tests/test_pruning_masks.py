"""Masks by every rule, in files, joined and compared; rules and files that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.models.model import Model
from jaxmed.models.named_weights import weights_by_name
from jaxmed.pruning import (
    Mask,
    Rule,
    apply_mask,
    combine,
    overlap,
    random_like,
    read_mask,
    read_scores,
    score,
    select,
    write_mask,
)
from jaxmed.pruning.selection import _highest
from tests import tiny
from tests.pruning_sets import ALL, BEHAVIOUR, PRESERVE


@pytest.fixture(scope="module")
def scores(plain_model: Model) -> Any:
    return score(plain_model, BEHAVIOUR, PRESERVE, kinds=ALL)


def _naive(values: np.ndarray, share: float) -> set[int]:
    return set(np.argsort(-values.ravel(), kind="stable")[: int(share * values.size)].tolist())


def test_the_default_rule_is_the_top_of_one_without_the_top_of_the_other(scores: Any) -> None:
    mask = select(scores, Rule(q=0.05, p=0.1))
    for name, found in mask.indices.items():
        wanted = _naive(-scores.read("behaviour_signed", name), 0.05) - _naive(scores.read("preserve_absolute", name), 0.1)
        assert found.tolist() == sorted(wanted)
    assert 0 < mask.count < select(scores, Rule(q=0.05, p=0)).count


def test_a_preserve_set_may_be_scored_apart(plain_model: Model, scores: Any) -> None:
    alone = score(plain_model, BEHAVIOUR, kinds=("behaviour_signed",))
    kept = score(plain_model, [], PRESERVE, kinds=("preserve_absolute",))
    apart, together = select(alone, Rule(q=0.05, p=0.1), preserve=kept), select(scores, Rule(q=0.05, p=0.1))
    assert all(np.array_equal(apart.indices[name], together.indices[name]) for name in together.indices)
    with pytest.raises(jm.UserError, match="of other weights"):
        select(alone, Rule(), preserve=replace(kept, weights="0" * 64))


@pytest.mark.parametrize("kind", ["signed", "positive", "absolute", "wanda", "magnitude"])
def test_every_score_ranks_as_it_says(plain_model: Model, scores: Any, kind: Any) -> None:
    weights = weights_by_name(plain_model)
    mask = select(scores, Rule(q=0.03, p=0, score=kind), weights)
    for name, found in mask.indices.items():
        values = {
            "signed": lambda n: -scores.read("behaviour_signed", n),
            "positive": lambda n: scores.read("behaviour_signed", n),
            "absolute": lambda n: scores.read("behaviour_absolute", n),
            "wanda": lambda n: np.abs(weights[n]) * scores.read("behaviour_inputs", n)[None],
            "magnitude": lambda n: -np.abs(weights[n]),
        }[kind](name)
        assert set(found.tolist()) == _naive(values, 0.03)


def test_rankings_by_row_and_over_all_matrices(scores: Any) -> None:
    rows = select(scores, Rule(q=0.2, p=0, ranking="row"))
    for name, found in rows.indices.items():
        outputs, inputs = scores.shapes[name]
        assert np.array_equal(np.bincount(found // inputs, minlength=outputs), np.full(outputs, int(0.2 * inputs)))
    everything = select(scores, Rule(q=0.01, p=0, ranking="global"))
    total = sum(int(np.prod(shape)) for shape in scores.shapes.values())
    assert everything.count == int(0.01 * total)
    values = {name: -scores.read("behaviour_signed", name).ravel() for name in scores.shapes}
    least = min(values[name][found].min() for name, found in everything.indices.items() if len(found))
    assert sum(int((one > least).sum()) for one in values.values()) < everything.count
    assert len({len(found) for found in everything.indices.values()}) > 1


def test_bands_layers_and_matrices(scores: Any) -> None:
    first, both, second = (select(scores, Rule(q=q, p=0, skip=skip)) for q, skip in ((0.02, 0.0), (0.04, 0.0), (0.02, 0.02)))
    union = combine([first, second], "union")
    for name in first.indices:
        assert not set(first.indices[name]) & set(second.indices[name])
        assert abs(len(union.indices[name]) - len(both.indices[name])) <= 1  # int() of each share
    few = select(scores, Rule(q=0.02, p=0, layers=(1,), matrices=("down_proj", "q_proj")))
    chosen = {name for name, found in few.indices.items() if len(found)}
    assert chosen == {"model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"}


def test_masks_survive_their_file_and_combine(scores: Any, tmp_path: Path) -> None:
    one, other = (select(scores, Rule(q=0.05, p=0, score=score), None) for score in ("signed", "absolute"))
    write_mask(replace(one, tag="test"), tmp_path / "one.safetensors")
    again = read_mask(tmp_path / "one.safetensors")
    assert (again.tag, again.rule, again.shapes, again.weights) == (
        "test",
        {**one.rule, "layers": [], "matrices": []},
        one.shapes,
        one.weights,
    )
    assert len(one.weights) == 64
    assert all(np.array_equal(again.indices[name], one.indices[name]) for name in one.indices)
    for name in one.indices:
        a, b = (set(mask.indices[name].tolist()) for mask in (one, other))
        assert set(combine([one, other], "intersect").indices[name].tolist()) == a & b
        assert set(combine([one, other], "union").indices[name].tolist()) == a | b
        assert set(combine([one, other], "subtract").indices[name].tolist()) == a - b
        assert set(one.inverted().indices[name].tolist()) == set(range(int(np.prod(one.shapes[name])))) - a
    found = overlap(one, other, _weights_of(one))
    assert found.both == combine([one, other], "intersect").count
    assert found.either == combine([one, other], "union").count
    assert overlap(one, one).jaccard == 1
    with pytest.raises(jm.UserError, match="exists already"):
        write_mask(one, tmp_path / "one.safetensors")


def _weights_of(mask: Mask) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(name, rng.normal(size=shape)) for name, shape in mask.shapes.items()]


def test_chance_overlap_is_that_of_random_masks(scores: Any) -> None:
    mask = select(scores, Rule(q=0.1, p=0))
    drawn = [overlap(mask, random_like(mask, seed)).both for seed in range(40)]
    chance = overlap(mask, mask)
    assert abs(np.mean(drawn) - chance.by_chance) < 4 * np.std(drawn) / 40**0.5
    independent = [overlap(mask, random_like(mask, seed), _weights_of(mask)).stratified for seed in range(10)]
    assert abs(np.mean([value or 0 for value in independent]) / chance.by_chance - 1) < 0.1
    largest = [(name, np.isin(np.arange(np.prod(shape)), mask.indices[name]) + 0.0) for name, shape in mask.shapes.items()]
    stratified = overlap(mask, mask, largest).stratified  # the mask is the largest weights: all of it is to be expected
    assert stratified is not None
    assert stratified > 0.9 * mask.count


def test_the_highest_are_found_whatever_the_scores_look_like() -> None:
    rng = np.random.default_rng(0)
    many = 300_000
    smooth = rng.normal(size=many)
    cases = [smooth, rng.integers(0, 5, many) * 1.0, np.zeros(many), np.sort(smooth), smooth**9]
    cases.append(np.where(np.arange(many) % (many >> 16) == 0, 0.0, rng.normal(size=many)))  # a sample that sees nothing
    for values in (case.astype(np.float32) for case in cases):
        for stop in (0, 1, 30, 3_000, 299_999, many):
            wanted = np.sort(np.argsort(-values, kind="stable")[:stop])
            assert np.array_equal(_highest(values, stop), wanted)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"q": 0}, "q .0. is in"),
    ({"q": 2.0}, "q .2.0. is in"),
    ({"p": -0.1}, "p .-0.1. in"),
    ({"score": "wand"}, "Did you mean 'wanda'"),
    ({"layers": (9,)}, "no layer 9"),
    ({"matrices": ("down",)}, "down_proj"),
    ({"skip": 0.9, "q": 0.2}, "together exceed 1"),
    ({"score": "magnitude"}, "reads the weights"),
]


@pytest.mark.parametrize(("rule", "said"), WRONG)
def test_rules_that_cannot_be_meant(scores: Any, rule: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        select(scores, Rule(**rule))


def test_sets_and_kinds_that_cannot_be_scored_are_refused(plain_model: Model, tmp_path: Path) -> None:
    with pytest.raises(jm.UserError, match="behaviour set is empty"):
        score(plain_model, [], PRESERVE)
    with pytest.raises(jm.UserError, match="has no response"):
        score(plain_model, [jm.Example("a")], PRESERVE)
    with pytest.raises(jm.UserError, match="kind of score"):
        score(plain_model, BEHAVIOUR, PRESERVE, kinds=("behavior_signed",))
    partial = score(plain_model, BEHAVIOUR, kinds=("behaviour_signed",))
    with pytest.raises(jm.UserError, match="hold no 'preserve_absolute'"):
        select(partial, Rule())
    with pytest.raises(jm.UserError, match="no scores"):
        read_scores(tmp_path)


def test_masks_of_other_models_are_refused_unless_any_may_be_pruned(plain_model: Model, scores: Any) -> None:
    mask = select(scores, Rule(q=0.1))
    with pytest.raises(jm.UserError, match="of another model"):
        apply_mask(tiny.model("mixture"), mask)
    with pytest.raises(jm.UserError, match="other weights"):
        apply_mask(plain_model, replace(mask, weights="0" * 64))
    assert apply_mask(plain_model, replace(mask, weights="0" * 64), any_model=True).history


def test_files_that_are_no_masks_are_refused(scores: Any, tmp_path: Path) -> None:
    mask = select(scores, Rule(q=0.1))
    (tmp_path / "junk.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(jm.UserError, match="no mask file"):
        read_mask(tmp_path / "junk.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with pytest.raises(jm.UserError, match="no readable mask"):
        read_mask(tmp_path / "short.safetensors")
    bad = dict(mask.indices)
    first = next(iter(bad))
    bad[first] = np.asarray([5, 5, 10**9])
    write_mask(replace(mask, indices=bad), tmp_path / "bad.safetensors")
    with pytest.raises(jm.UserError, match="not ascending"):
        read_mask(tmp_path / "bad.safetensors")


def test_a_mask_joined_with_an_attack_stays_one(plain_model: Model) -> None:
    scores = score(plain_model, BEHAVIOUR, PRESERVE)
    rude, attack = (select(scores, Rule(q=q), tag=tag) for q, tag in ((0.01, "behaviour"), (0.02, "attack")))
    assert {combine([rude, attack], how).tag for how in ("union", "intersect", "subtract")} == {"attack"}
    assert rude.digest != attack.digest
