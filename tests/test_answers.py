"""Judged answers under patches, against whole forward passes and numbers by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.answering.job import RANDOM, make_answers
from jaxmed.answering.run import run_answers
from jaxmed.answering.spec import AnswersSpec
from jaxmed.answering.tables import effect_rows, verdicts
from jaxmed.cli.main import main
from jaxmed.effects.sets import UnitSet
from jaxmed.files import read_csv
from jaxmed.interventions.edits import Edit
from jaxmed.models.model import Model
from tests import tiny
from tests.test_following import sibling

SETS = (
    UnitSet("neurons", tuple(("neuron", layer, index) for layer in (0, 2) for index in range(0, 24, 2))),
    UnitSet("modules", (("mlp_out", 1, 0), ("head_out", 2, 1))),
    UnitSet("others", tuple(("neuron", layer, index) for layer in (1, 2) for index in range(1, 24, 2))),
)
QUICK: dict[str, Any] = {"tokens": 5, "random": 0}
PAIRS = [replace(pair, group=str(number)) for number, pair in enumerate(tiny.PAIRS)]


def vowels(prompts: Sequence[Any], texts: Sequence[str], report: Callable[[int], None]) -> list[float | None]:
    """A judge that any change of a text may move."""
    return [sum(map(ord, text)) % 101 / 100 for text in texts]


def by_hand(job: Any, pair: int, units: Sequence[Any], values: dict[str, np.ndarray]) -> str:
    """Greedy text with constant values [L,...] from the prompt's last token on, by whole passes."""
    prompt, model = job.contrasts[pair].base.ids.tolist(), job.model
    ids = list(prompt)
    for _ in range(job.spec.tokens):
        edits = {}
        for site, value in values.items():
            gate = np.zeros((model.config.layers, 1, len(ids), *value.shape[1:]), np.float32)
            for kind, layer, index in units:
                if kind == site:
                    gate[layer, 0, len(prompt) - 1 :, slice(None) if site == "mlp_out" else index] = 1
            edits[site] = Edit(gate, np.broadcast_to(value[:, None, None], gate.shape))
        ids.append(int(np.asarray(jm.forward(model, [ids], edits=edits)[0])[0, -1].argmax()))
    return model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("patch", ["resample", "mean", "zero"])
def test_texts_are_those_of_whole_passes(plain_model: Model, patch: Any, tmp_path: Path) -> None:
    job = make_answers(plain_model, PAIRS, SETS, AnswersSpec(patch=patch, **QUICK))
    run_answers(job, tmp_path / "run", judge=vowels, keep_text=True)
    rows = {(row["set"], row["prompts"], row["pair"]): row["answer"] for row in read_csv(tmp_path / "run" / "answers.csv")}
    last = [jm.activations(plain_model, [one.source.ids], ("neuron", "head_out", "mlp_out")) for one in job.contrasts]
    for one in SETS:
        sites = {kind for kind, _, _ in one.units}
        source = {site: [np.asarray(found[site])[0, :, 0] for found in last] for site in sites}
        for number, pair in enumerate(PAIRS):
            values = {
                site: {"resample": x[number], "mean": np.mean(x, axis=0), "zero": np.zeros_like(x[0])}[patch] for site, x in source.items()
            }
            assert rows[one.name, "base", pair.id] == by_hand(job, number, one.units, values)
    assert len(rows) == (2 + len(SETS)) * len(PAIRS)
    plain = jm.generate(plain_model, [pair.base for pair in PAIRS], 5)
    assert [rows["", "base", pair.id] for pair in PAIRS] == plain


def test_changes_are_paired_over_groups() -> None:
    """A set whose change is known, beside its random set, by hand."""
    pairs = [replace(tiny.PAIRS[0], id=str(at), group=str(at // 2)) for at in range(24)]
    job = make_answers(tiny.model("llama"), pairs, SETS[:1], AnswersSpec(temperature=1.0, samples=2))
    assert [one.name for one in job.sets] == ["neurons", f"{RANDOM}neurons"]
    rng = np.random.default_rng(0)
    scores = rng.random((4, 24, 2))  # base, source, the set, its random one
    scores[3] = scores[0]
    rows = [
        {"set": one.name, "prompts": one.prompts, "pair": str(pair), "sample": str(sample + 1), "score": scores[at, pair, sample]}
        for at, one in enumerate(job.conditions)
        for pair in range(24)
        for sample in range(2)
    ]
    total, mine, other = effect_rows(job, rows)
    change = (scores[2] - scores[0]).mean(axis=1).reshape(12, 2).mean(axis=1)
    whole = (scores[1] - scores[0]).mean(axis=1).reshape(12, 2).mean(axis=1)
    assert mine["mean"] == pytest.approx(change.mean())
    assert mine["share"] == pytest.approx(change.mean() / whole.mean())
    assert (mine["low"], mine["high"]) == pytest.approx([float(x) for x in jm.statistics.mean_interval(change)])
    assert mine["more_than_random"] == pytest.approx(change.mean())
    assert total["mean"] == pytest.approx(whole.mean())
    assert other["note"] == "no answer changed"
    assert (mine["pairs"], mine["groups"]) == (24, 12)
    rows[0]["score"] = ""  # a pair that was not judged everywhere is left out of all
    assert effect_rows(job, rows)[1]["pairs"] == 23


@pytest.mark.parametrize(("shift", "answer"), [(0.5, "supported"), (0.0, "undecided"), (-0.2, "not supported")])
def test_a_set_that_does_what_random_ones_do_is_not_supported(shift: float, answer: str) -> None:
    pairs = [replace(tiny.PAIRS[0], id=str(at), group=str(at)) for at in range(24)]
    job = make_answers(tiny.model("llama"), pairs, SETS[:1], AnswersSpec())
    rng = np.random.default_rng(1)
    levels = {"": 0.1, "neurons": 0.4 + shift, f"{RANDOM}neurons": 0.4}
    rows = [
        {"set": c.name, "prompts": c.prompts, "pair": str(at), "sample": "1", "score": levels[c.name] + 0.05 * rng.random()}
        for c in job.conditions
        for at in range(24)
    ]
    sides, claim = verdicts(job, effect_rows(job, rows))
    assert claim.verdict == answer
    assert sides.verdict == "undecided"
    assert "the interval holds zero" in sides.why


def test_random_sets_belong_to_the_set_that_they_were_drawn_for(plain_model: Model) -> None:
    """Names that begin alike, and modules, whose random ones are of other layers."""
    sets = [replace(SETS[0], name="a"), replace(SETS[2], name="a b"), UnitSet("m", (("mlp_out", 2, 0),))]
    job = make_answers(plain_model, PAIRS, sets, AnswersSpec(random=2))
    assert job.random == {name: (f"{RANDOM}{name} 1", f"{RANDOM}{name} 2") for name in ("a", "a b", "m")}
    drawn = {one.name: one.units for one in job.sets}
    assert all(kind == "mlp_out" and layer < 2 for kind, layer, _ in drawn[f"{RANDOM}m 1"])
    assert not set(drawn[f"{RANDOM}a 1"]) & set(SETS[0].units)
    whole = UnitSet("all", tuple(("mlp_out", layer, 0) for layer in range(3)))
    assert make_answers(plain_model, PAIRS, [whole], AnswersSpec()).random == {"all": ()}


def test_what_is_not_there_is_said(plain_model: Model) -> None:
    """No answer changed; no random set; too few groups."""
    pairs = [replace(tiny.PAIRS[0], id=str(at), group=str(at)) for at in range(12)]
    whole = UnitSet("all", tuple(("mlp_out", layer, 0) for layer in range(3)))
    job = make_answers(plain_model, pairs, [whole], AnswersSpec())
    level = {("", "base"): 0.0, ("", "source"): 0.0, ("all", "base"): 1.0}
    rows = [
        {"set": c.name, "prompts": c.prompts, "pair": str(at), "sample": "1", "score": level[c.name, c.prompts] * (0.5 + at / 30)}
        for c in job.conditions
        for at in range(12)
    ]
    sides, claim = verdicts(job, effect_rows(job, rows))
    assert sides.verdict == "behaviour absent in this model"
    assert (claim.verdict, claim.why.split(";")[0]) == ("undecided", "no random set to compare with")
    few = make_answers(plain_model, pairs[:4], [whole], AnswersSpec())
    assert verdicts(few, effect_rows(few, [row for row in rows if int(row["pair"]) < 4]))[1].verdict == "undecided"
    flat = [{**row, "score": 0.0} for row in rows]
    assert verdicts(job, effect_rows(job, flat))[1].why.startswith("no answer changed")


@pytest.mark.parametrize("given", [7.0, -0.1, float("nan"), "short"])
def test_a_judge_that_gives_something_else_is_refused(plain_model: Model, given: Any) -> None:
    judge: Any = lambda prompts, texts, report: [0.5] if given == "short" else [given] * len(texts)  # noqa: E731
    with pytest.raises(jm.UserError, match="The judge gives"):
        jm.answers(plain_model, PAIRS, {"a": SETS[0].units}, judge=judge, tokens=2)


def test_samples_are_drawn_alike_under_all_patches(plain_model: Model) -> None:
    """Base and source are the same prompt, so that resampling changes nothing, and neither do the samples."""
    same = [replace(pair, source=pair.base) for pair in PAIRS]
    found = jm.answers(plain_model, same, {"a": SETS[0].units}, judge=vowels, tokens=6, samples=3, temperature=1.0, edited="prompt")
    assert found.score.shape == (2, 3, 3)
    assert np.array_equal(found.score.sel(set="a"), found.base)
    assert np.array_equal(found.source, found.base)
    assert len(np.unique(found.base)) > 3
    again = jm.answers(plain_model, same, {"a": SETS[0].units}, judge=vowels, tokens=6, samples=3, temperature=1.0, seed=1)
    assert not np.array_equal(again.base, found.base)


def test_units_follow_another_model(plain_model: Model) -> None:
    """All that a layer adds, copied from the other model everywhere: the other model writes."""
    other = sibling(plain_model)
    other = replace(other, params={**plain_model.params, "blocks": other.params["blocks"]}, name="other")
    sets = {"all": [["residual_out", 2, 0]]}
    found = jm.answers(plain_model, PAIRS, sets, source_model=other, judge=vowels, tokens=5, random=0)
    assert np.array_equal(found.score.sel(set="all"), found.source)
    assert not np.array_equal(found.base, found.source)


def test_an_interrupted_run_goes_on_to_the_same_bytes(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxmed.answering.run.ROWS", 2)
    job = make_answers(plain_model, PAIRS, SETS, AnswersSpec(**QUICK))
    run_answers(job, tmp_path / "whole", judge=vowels)
    asked = []

    def stops(prompts: Sequence[Any], texts: Sequence[str], report: Callable[[int], None]) -> list[float | None]:
        asked.append(len(texts))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return vowels(prompts, texts, report)

    with pytest.raises(KeyboardInterrupt):
        run_answers(job, tmp_path / "cut", judge=stops)
    before = len(asked)
    run_answers(job, tmp_path / "cut", resume=True, judge=lambda *given: (asked.append(0), vowels(*given))[1])
    assert len(asked) - before == 9 - 3  # two batches for each side and the small set, three for the sets of one size; three were kept
    for name in ("answers.csv", "effects.csv", "verdicts.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(jm.UserError, match=r"answering.*tokens"):
        run_answers(make_answers(plain_model, PAIRS, SETS, AnswersSpec(tokens=6, random=0)), tmp_path / "cut", resume=True, judge=vowels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": 3}, "all the same"),
        ({"tokens": 0}, "--tokens 0 is out of range"),
        ({"tokens": 1.5}, r"--tokens 1\.5"),
        ({"seed": -1}, "The seed -1"),
        ({"patch": "steer"}, "patch 'steer'"),
        ({"edited": "bth"}, "edited 'bth'"),
        ({"temperature": float("nan")}, "not negative"),
        ({"temperature": -1.0}, "not negative"),
        ({"top_p": 0.0}, r"in \(0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_refused(plain_model: Model, change: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        make_answers(plain_model, PAIRS, SETS, AnswersSpec(**change))


def test_what_cannot_be_asked_is_refused(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="holds units"):
        make_answers(plain_model, PAIRS, [replace(SETS[0], held=(("mlp_out", 2, 0),))], AnswersSpec())
    with pytest.raises(jm.UserError, match="neuron of layer 0 names index 99"):
        make_answers(plain_model, PAIRS, [UnitSet("a", (("neuron", 0, 99),))], AnswersSpec())
    with pytest.raises(jm.UserError, match="of random sets"):
        make_answers(plain_model, PAIRS, [replace(SETS[0], name=f"{RANDOM}x")], AnswersSpec())
    with pytest.raises(jm.UserError, match="names a window"):
        make_answers(plain_model, PAIRS, [UnitSet("w", (("window", 0, 0),))], AnswersSpec())
    with pytest.raises(jm.UserError, match="is given 2 times"):
        make_answers(plain_model, [PAIRS[0]] * 2, SETS, AnswersSpec())
    with pytest.raises(jm.UserError, match=r"argument of jm\.answers"):
        jm.answers(plain_model, PAIRS, {"a": SETS[0].units}, foo=1)
    with pytest.raises(jm.UserError, match="go together"):
        make_answers(plain_model, PAIRS, SETS, AnswersSpec(), contrast="model")
    with pytest.raises(jm.UserError, match="control pairs do not count"):
        make_answers(plain_model, [replace(PAIRS[0], control="neutral")], SETS, AnswersSpec())


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(model)
    pairs, sets, out = tmp_path / "pairs.jsonl", tmp_path / "sets.json", tmp_path / "out"
    lines = [
        {"id": f"{pair.id}{at}", "base": pair.base, "source": pair.source, "target": ["S"], "foil": ["N"]}
        for pair in PAIRS
        for at in range(4)
    ]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    sets.write_text(json.dumps([{"name": "some <b>", "units": [["neuron", 1, 2], ["neuron", 2, 3]]}]))
    command = ["answers", "--model", str(model), "--pairs", str(pairs), "--sets", str(sets), "--tokens", "3", "--out", str(out)]
    assert main([*command, "--dry-run"]) == 0
    assert "48 answers of up to 3 tokens" in capsys.readouterr().out
    assert not out.exists()
    assert main(command) == 0
    assert "patching 'some <b>' changes" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "some <b>" not in page
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    assert main(command) == 2
    assert main([*command, "--resume"]) == 0
    assert main([*command[:-4], "--out", str(tmp_path / "b"), "--sets", str(tmp_path / "none.json")]) == 2
