"""Experiments over masks: first-order predictions, compression, dissociation, attacks, and their commands."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.scoring import choice_logits, example_losses
from jaxmed.batching.texts import encode
from jaxmed.cli.main import main
from jaxmed.experiments.attacks import Attack, run_attacks, shifted, without_refusal
from jaxmed.experiments.compression import HALVED, Curve, at_fraction, compression_rows, q50, read_curve
from jaxmed.experiments.curve import CurveRequest, predicted_rise, run_curve
from jaxmed.experiments.dissociation import Abilities, answer_tokens, detection, run_dissociation
from jaxmed.experiments.measure import make_tests, measure
from jaxmed.experiments.table import Examples, Table
from jaxmed.models.model import Model
from jaxmed.models.named_weights import named_weights, weights_by_name
from jaxmed.pruning import Mask, Rule, select, write_mask
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.scores import Scores, score
from jaxmed.reports.curves import draw_pruning_curve
from jaxmed.statistics import auc
from jaxmed.tokens import TokenizedExample, prompt_ids
from tests import tiny

BEHAVIOUR = [jm.Example(f"ask {i}" + "x" * (5 * i % 13), f"no {'abc'[i % 3] * (i % 4 + 1)}", kind="harmful") for i in range(12)]
TWINS = [replace(one, response=f"yes {i}", kind="benign") for i, one in enumerate(BEHAVIOUR)]


@pytest.fixture(scope="module")
def yes_no_model(plain_model: Model) -> Model:
    """The tiny model with a tokenizer that knows yes and no as tokens."""
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(["yes", "no", "Yes"])
    return replace(plain_model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def scores(plain_model: Model) -> Scores:
    return score(plain_model, BEHAVIOUR, TWINS)


@pytest.fixture(scope="module")
def masks(scores: Scores) -> dict[str, Mask]:
    return {"few": select(scores, Rule(q=0.02, p=0.01)), "more": select(scores, Rule(q=0.2, p=0.01))}


# Curves


def test_a_curve_says_what_was_to_be_expected_to_first_order(plain_model: Model, scores: Scores, masks: dict[str, Mask]) -> None:
    weights = weights_by_name(plain_model)
    gradients = {name: scores.read("behaviour_signed", name) / weights[name] for name in weights}
    wanted = sum(
        -(gradients[name].ravel()[at] * weights[name].ravel()[at]).sum() / len(BEHAVIOUR) for name, at in masks["few"].indices.items()
    )
    assert predicted_rise(scores, masks["few"]) == pytest.approx(wanted, rel=1e-4)
    tests = make_tests(plain_model, {"scored": BEHAVIOUR}, "")
    table = run_curve(plain_model, CurveRequest(scores, Rule(q=0.02, p=0.01), (0.02,)), tests)
    rows = {(row["rule"], row["q"]): row for row in table.rows}
    assert rows["signed", 0.02]["first_order"] == pytest.approx(wanted, rel=1e-4)
    assert rows["none", 0.0]["first_order"] == rows["none", 0.0]["scored_rise"] == 0
    part = apply_mask(plain_model, masks["few"], "scale", 0.99)
    true = (example_losses(part, tests.sets["scored"]) - example_losses(plain_model, tests.sets["scored"])).mean()
    assert true / 0.01 == pytest.approx(wanted, rel=0.1)


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    table = Table(("mask", "seed"), tmp_path / "t.csv")
    table.add({"mask": "1e-3", "seed": 0, "loss": 1.5})
    again = Table(("mask", "seed"), tmp_path / "t.csv")
    assert again.has("1e-3", 0)
    assert again.rows == table.rows


def test_a_curve_is_resumed_after_its_last_row(plain_model: Model, scores: Scores, tmp_path: Path) -> None:
    tests = make_tests(plain_model, {"a": BEHAVIOUR, "b": TWINS}, "")
    key, count = ("rule", "q", "seed"), []

    def run(folder: Path, most: int) -> tuple[str, str]:
        def stop(row: Any) -> None:
            count.append(row["q"])
            if len(count) == most:
                raise KeyboardInterrupt

        folder.mkdir(exist_ok=True)
        table, examples = Table(key, folder / "curve.csv", stop), Examples(key, folder / "examples.csv")
        run_curve(plain_model, CurveRequest(scores, Rule(p=0.01), (0.02, 0.1), ("random",), 2), tests, table, examples)
        return (folder / "curve.csv").read_text(), (folder / "examples.csv").read_text()

    whole = run(tmp_path / "whole", 0)
    assert len(count) == 7
    count.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 3)
    assert run(tmp_path / "cut", 0) == whole
    assert len(count) == 7
    rows = list(csv.DictReader(whole[1].splitlines()))
    assert len(rows) == 7 * 2 * 12
    first = [float(row["loss"]) for row in rows if row["rule"] == "none" and row["set"] == "b"]
    assert np.allclose(first, example_losses(plain_model, tests.sets["b"]))


def test_the_unpruned_model_is_not_measured_again(
    plain_model: Model, scores: Scores, masks: dict[str, Mask], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxmed.experiments import curve

    tests = make_tests(plain_model, {"b": BEHAVIOUR}, "")
    more = make_tests(plain_model, {"other": TWINS, "b": BEHAVIOUR}, "")
    held = measure(plain_model, more)
    measured: list[Any] = []
    monkeypatch.setattr(curve, "measure", lambda *given: measured.append(given) or measure(*given))
    table = curve.run_curve(plain_model, CurveRequest(scores, Rule(p=0), (0.01, 0.1)), tests, before=lambda: held)
    assert len(measured) == 4  # the rule and random weights at two shares; not the model as it is
    assert {row["b_loss"] for row in table.rows if row["rule"] == "none"} == {held.losses["b"].mean()}
    assert not any(column.startswith("other") for column in table.rows[0])
    transfer = curve.run_transfer(plain_model, masks, tests, before=lambda: held)
    measured.clear()
    curve.run_curve(plain_model, CurveRequest(scores, Rule(p=0), (0.01, 0.1)), tests, table=table)
    curve.run_transfer(plain_model, masks, tests, table=transfer)
    assert measured == []


# Compression


def test_q50_is_where_the_loss_has_risen_by_ln_2() -> None:
    rises = np.array([[0.1, 0.3], [0.4, 0.8], [1.0, 2.0]])
    curve = Curve(np.array([1e-4, 1e-3, 1e-2]), rises, np.array([1.0, 1.1, 4.0]), np.array([1e-6, 1e-5, 1e-3]))
    part = (HALVED - 0.6) / (1.5 - 0.6)
    assert q50(curve) == pytest.approx(10 ** (-3 + part))
    assert q50(curve, np.array([0.0, 1.0])) == pytest.approx(10 ** (-4 + (HALVED - 0.3) / 0.5))
    assert q50(replace(curve, rises=rises / 10)) == math.inf
    assert q50(replace(curve, rises=rises + 1)) == 1e-4
    assert at_fraction(curve, curve.ratio, 10**-2.5) == pytest.approx((1.1 * 4) ** 0.5)
    assert at_fraction(curve, curve.fraction, 10**-2.5) == pytest.approx(1e-4)
    assert math.isnan(at_fraction(curve, curve.ratio, 1e-5))


def _curve(halved_at: float, seed: int, ratio: float = 1.0) -> Curve:
    """A curve of 40 examples whose mean rise is straight in log q and reaches ln 2 at `halved_at`."""
    q = np.logspace(-5, -1, 9)
    noise = np.random.default_rng(seed).normal(size=40)
    each = HALVED * (1 + 0.2 * (noise - noise.mean()))
    return Curve(q, np.maximum(0.0, 1 + np.log10(q / halved_at))[:, None] * each, np.full(9, ratio), q / 30)


def test_compression_is_the_log_of_the_ratio_minus_the_control_s() -> None:
    curves = {
        "base": {"rude": _curve(1e-2, 0), "trivia": _curve(1e-2, 1)},
        "aligned": {"rude": _curve(1e-3, 0, 1.2), "trivia": _curve(5e-3, 1)},
    }
    rows = {(row["model"], row["behaviour"]): row for row in compression_rows(curves, "base", "trivia")}
    rude = rows["aligned", "rude"]
    assert rude["compression"] == pytest.approx(math.log(10), rel=0.02)
    assert rude["net"] == pytest.approx(math.log(10) - math.log(2), rel=0.05)
    assert rude["net_low"] < rude["net"] < rude["net_high"]
    assert rude["q50_low"] < rude["q50"] < rude["q50_high"]
    assert (rude["within_limit"], rows["base", "rude"]["within_limit"]) == (0, 1)
    assert rows["aligned", "trivia"]["net"] == 0
    curves["aligned"]["rude"] = replace(curves["aligned"]["rude"], rises=curves["aligned"]["rude"].rises / 1e3)
    never = {(row["model"], row["behaviour"]): row for row in compression_rows(curves, "base", "")}["aligned", "rude"]
    assert (never["q50"], never["compression"], never["within_limit"], never["reached"]) == (math.inf, -math.inf, 0, "no")
    assert math.isnan(never["net_low"])
    curves["aligned"]["rude"] = replace(_curve(1e-6, 0), ratio=np.full(9, math.nan))
    early = {(row["model"], row["behaviour"]): row for row in compression_rows(curves, "base", "")}["aligned", "rude"]
    assert early["q50"] == pytest.approx(1e-5)
    assert (early["q50_low"], early["reached"], early["within_limit"]) == (0.0, "at most", "")


def test_curves_come_from_the_tables_of_prune_curve(plain_model: Model, scores: Scores) -> None:
    tests = make_tests(plain_model, {"a": BEHAVIOUR}, "")
    table, examples = Table(("rule", "q", "seed")), Examples(("rule", "q", "seed"))
    run_curve(plain_model, CurveRequest(scores, Rule(p=0.01), (0.1, 0.02)), tests, table, examples)
    curve = read_curve(table.rows, examples.rows, "a")
    assert curve.q.tolist() == [0.02, 0.1]
    rises = [row["a_rise"] for row in sorted(table.rows, key=lambda row: row["q"]) if row["rule"] == "signed"]
    assert np.allclose(curve.rises.mean(1), rises)
    with pytest.raises(jm.UserError, match="no losses of single examples of 'b'"):
        read_curve(table.rows, examples.rows, "b")


# Dissociation


def test_detection_is_the_log_odds_of_yes(yes_no_model: Model) -> None:
    abilities = Abilities("rude", BEHAVIOUR[:3], TWINS[:2], question="Is {response} {name}?")
    yes, no = answer_tokens(yes_no_model)
    assert (len(yes), len(no)) == (2, 1)
    found = np.concatenate(detection(yes_no_model, abilities))
    for value, row in zip(found, [*BEHAVIOUR[:3], *TWINS[:2]], strict=True):
        ids = prompt_ids(yes_no_model.tokenizer, jm.Example(f"Is {row.response} rude?"))
        logits = np.asarray(jm.forward(yes_no_model, ids[None])[0][0, -1], np.float64)
        assert value == pytest.approx(np.logaddexp(*logits[yes]) - logits[no[0]], abs=1e-4)


def test_a_few_logits_are_those_of_forward(tiny_model: Model) -> None:
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 11, 30)]
    found = choice_logits(tiny_model, prompts, [7, 2])
    for row, ids in zip(found, prompts, strict=True):
        assert np.allclose(row, np.asarray(jm.forward(tiny_model, ids[None])[0])[0, -1, [7, 2]], atol=1e-4)


def test_dissociation(yes_no_model: Model, masks: dict[str, Mask]) -> None:
    abilities = Abilities("rude", BEHAVIOUR, TWINS, TWINS, BEHAVIOUR, (), text="", tokens=3)
    rows = {(row["mask"], row["seed"]): row for row in run_dissociation(yes_no_model, masks, abilities).rows}
    assert list(rows) == [("none", 0), ("few", 0), ("random like few", 0), ("more", 0), ("random like more", 0)]
    pruned = apply_mask(yes_no_model, masks["more"])
    encoded = encode(yes_no_model.tokenizer, BEHAVIOUR)
    assert rows["more", 0]["generate_loss"] == pytest.approx(example_losses(pruned, encoded).mean())
    assert rows["more", 0]["generate_rise"] > rows["few", 0]["generate_rise"] > rows["none", 0]["generate_rise"] == 0
    odds = detection(pruned, abilities)
    assert rows["more", 0]["detect_auc"] == auc(*odds)
    assert rows["more", 0]["detect_yes"] == (odds[0] > 0).mean()
    assert rows["more", 0]["detect_twin_no"] == (odds[1] < 0).mean()
    assert 0 <= rows["none", 0]["refuse_low"] <= rows["none", 0]["refuse"] <= rows["none", 0]["refuse_high"] <= 1
    with pytest.raises(jm.UserError, match="same about every row"):
        run_dissociation(yes_no_model, masks, replace(abilities, question="Is it rude?"))
    with pytest.raises(jm.UserError, match="no single tokens for yes and no"):
        detection(replace(yes_no_model, tokenizer=tiny.tokenizer()), abilities)


# Attacks


def test_a_pre_filled_opening_is_not_scored(plain_model: Model) -> None:
    examples = [TokenizedExample(np.arange(1, 20, dtype=np.int32), 5), TokenizedExample(np.arange(1, 9, dtype=np.int32), 5)]
    (left,) = shifted(examples, 3)
    logits = np.asarray(jm.forward(plain_model, left.ids[None])[0][0], np.float64)
    own = logits[np.arange(7, 18), left.ids[8:]] - np.logaddexp.reduce(logits[7:18], axis=1)
    assert example_losses(plain_model, [left])[0] == pytest.approx(-own.mean(), abs=1e-5)


@pytest.mark.slow
def test_removed_refusal_is_absolute_snip_without_the_preserve_set_s(plain_model: Model, tmp_path: Path) -> None:
    attack = Attack(BEHAVIOUR, refusals=BEHAVIOUR, preserve=TWINS, rule=Rule(q=0.1, p=0.05, score="absolute"))
    attacked = without_refusal(plain_model, attack)
    held = score(plain_model, BEHAVIOUR, TWINS, kinds=("behaviour_absolute", "preserve_absolute"), form="chat")
    after = weights_by_name(attacked)
    for name, values in named_weights(plain_model):
        ranked = {kind: np.argsort(-held.read(f"{kind}_absolute", name).ravel(), kind="stable") for kind in ("behaviour", "preserve")}
        chosen = set(ranked["behaviour"][: int(0.1 * values.size)]) - set(ranked["preserve"][: int(0.05 * values.size)])
        assert {int(i) for i in np.nonzero((after[name] != values).ravel())[0]} == chosen
    with pytest.raises(jm.UserError, match="attack"):
        jm.export_folder(attacked, tmp_path / "out")
    with pytest.raises(jm.UserError, match="attack"):
        jm.export_folder(apply_mask(attacked, select(held, Rule(q=0.1, score="absolute")), any_model=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attacks(plain_model: Model, masks: dict[str, Mask]) -> None:
    attack = Attack(BEHAVIOUR, BEHAVIOUR[:2], BEHAVIOUR, TWINS, 3, Rule(q=0.1, p=0.05, score="absolute"), 2, text="")
    rows = {(row["mask"], row["attack"]): row for row in run_attacks(plain_model, masks, attack).rows}
    assert len(rows) == 3 * 4
    opened = shifted(encode(plain_model.tokenizer, BEHAVIOUR), 3)
    pruned = apply_mask(plain_model, masks["few"])
    assert rows["few", "prefill"]["generate_loss"] == pytest.approx(example_losses(pruned, opened).mean())
    both = example_losses(without_refusal(pruned, attack), opened)
    assert rows["few", "both"]["generate_loss"] == pytest.approx(both.mean())
    assert rows["few", "both"]["generate_rise"] == pytest.approx((both - example_losses(plain_model, opened)).mean(), abs=1e-6)
    assert rows["none", "none"]["generate_rise"] == rows["none", "prefill"]["generate_rise"] == 0
    assert rows["none", "prefill"]["refuse"] == ""
    with pytest.raises(jm.UserError, match="more than 300 tokens"):
        run_attacks(plain_model, masks, replace(attack, prefill=300))
    with pytest.raises(jm.UserError, match="which was not scored"):
        run_curve(
            plain_model, CurveRequest(score(plain_model, BEHAVIOUR, TWINS), Rule(), (0.1,), ("wanda",)), make_tests(plain_model, {}, "")
        )
    with pytest.raises(jm.UserError, match="needs both"):
        run_attacks(plain_model, masks, replace(attack, preserve=()))


# Commands


@pytest.mark.slow
def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture, yes_no_model: Model) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    yes_no_model.tokenizer.save_pretrained(folder)
    files = {}
    for name, rows in (("bad", BEHAVIOUR), ("good", TWINS)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        columns = ("prompt", "response", "kind")
        Path(files[name]).write_text("".join(json.dumps({key: getattr(one, key) for key in columns}) + "\n" for one in rows))
    base, short = ["--model", str(folder)], ["--text", "", "--split", ""]
    scoring = ["prune", "score", *base, "--behaviour", files["bad"], "--preserve", files["good"]]
    assert main([*scoring, "--out", str(tmp_path / "scores")]) == 0
    curve = ["prune", "curve", *base, *short, "--scores", str(tmp_path / "scores"), "--tests", files["bad"], "--scored", files["bad"]]
    for out in ("curve1", "curve2"):
        assert main([*curve, "--qs", "0.02", "0.3", "--p", "0.01", "--out", str(tmp_path / out)]) == 0
    assert "first order" in capsys.readouterr().out
    assert main([*curve, "--qs", "0.02", "--limit", "3", "--out", str(tmp_path / "curve3")]) == 0
    other = ["prune", "compression", "--base", str(tmp_path / "curve1"), "--aligned", str(tmp_path / "curve3"), "--behaviours", "bad"]
    assert main([*other, "--names", "one", "other", "--out", str(tmp_path / "c")]) == 2
    assert "differ in 'limit'" in capsys.readouterr().err
    assert main([*curve[:-1], files["good"], "--qs", "0.02", "--out", str(tmp_path / "curve4")]) == 2
    assert "not those that were scored" in capsys.readouterr().err
    assert not (tmp_path / "curve4").exists()
    Path(files["bad"]).write_text(Path(files["bad"]).read_text().replace("no a", "no b"))
    assert main([*curve[:-2], "--qs", "0.02", "0.3", "--p", "0.01", "--out", str(tmp_path / "curve1"), "--resume"]) == 2
    assert "contents" in capsys.readouterr().err
    compared = ["prune", "compression", "--base", str(tmp_path / "curve1"), "--aligned", str(tmp_path / "curve2"), "--behaviours", "bad"]
    assert main([*compared, "--out", str(tmp_path / "c")]) == 2
    assert "Two models are called" in capsys.readouterr().err
    assert main([*compared, "--names", "one", "other", "--out", str(tmp_path / "c")]) == 0
    assert "one" in (tmp_path / "c" / "compression.html").read_text()
    assert main([*compared, "--names", "one", "other", "--control", "x", "--out", str(tmp_path / "c2")]) == 2
    held = read_scores_mask(tmp_path / "scores", tmp_path / "few.safetensors")
    asked = [*base, *short, "--masks", str(held), "--behaviour", files["bad"], "--requests", files["bad"], "--preserve", files["good"]]
    dissociation = ["prune", "dissociation", *asked, "--twins", files["good"], "--explanations", "", "--tokens", "2"]
    assert main([*dissociation, "--out", str(tmp_path / "d")]) == 0
    again = (tmp_path / "d" / "dissociation.csv").read_text()
    assert main([*dissociation, "--out", str(tmp_path / "d"), "--resume"]) == 0
    assert (tmp_path / "d" / "dissociation.csv").read_text() == again
    assert "refuse: rate" in (tmp_path / "d" / "dissociation.html").read_text()
    assert main([*dissociation, "--out", str(tmp_path / "d3"), "--question", "Is it?"]) == 2
    attack = ["prune", "attack", *asked, "--refusals", files["bad"], "--prefill", "3", "--tokens", "2", "--refusal-q", "0.1"]
    assert main([*attack, "--out", str(tmp_path / "a")]) == 0
    assert len((tmp_path / "a" / "attacks.csv").read_text().splitlines()) == 1 + 2 * 4
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".csv", ".html", ".json"}  # no weights are written
    assert main([*attack, "--out", str(tmp_path / "a2"), "--refusal-q", "2"]) == 2
    assert not (tmp_path / "a2").exists()


def read_scores_mask(folder: Path, file: Path) -> Path:
    """A mask file of the scores in a folder."""
    from jaxmed.pruning import read_scores

    write_mask(select(read_scores(folder), Rule(q=0.05, p=0.01)), file)
    return file


def test_the_curve_s_figure_shows_what_is_left_of_the_probability() -> None:
    shared = {"seed": "0", "weights": "3"}
    rises = {"rude_rise": "0.693147", "rude_low": "0.5", "rude_high": "1.0"}
    text = {"perplexity_ratio": "1.25", "perplexity_low": "1.2", "perplexity_high": "1.3"}
    rows = [{"rule": rule, "q": q, **shared, **rises, **text} for rule in ("none", "signed") for q in ("1e-4", "3e-4")]
    rude, plain = cast("tuple[Any, Any]", draw_pruning_curve(rows).data)
    assert (rude.name, plain.name) == ("rude, signed", "plain text, signed")
    assert np.allclose(rude.y, 0.5)
    assert np.allclose(plain.y, 0.8)
    assert np.allclose([rude.y[0] - rude.error_y.arrayminus[0], rude.y[0] + rude.error_y.array[0]], np.exp([-1.0, -0.5]))
    without = [{key: value for key, value in row.items() if "perplexity" not in key} for row in rows]
    assert [trace.name for trace in cast("tuple[Any, ...]", draw_pruning_curve(without).data)] == ["rude, signed"]
