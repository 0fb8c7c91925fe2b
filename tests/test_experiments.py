"""Experiments over masks: dissociation, attacks, and the commands."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.scoring import choice_logits, example_losses
from jaxmed.batching.texts import encode
from jaxmed.cli.main import main
from jaxmed.experiments.attacks import TRAINING, Attack, fine_tuned, run_attacks, shifted, without_refusal
from jaxmed.experiments.curve import CurveRequest, run_curve
from jaxmed.experiments.dissociation import Abilities, answer_tokens, detection, run_dissociation
from jaxmed.experiments.measure import make_tests
from jaxmed.models.model import Model
from jaxmed.models.named_weights import named_weights, weights_by_name
from jaxmed.pruning import Mask, Rule, select, write_mask
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.scores import Scores, score
from jaxmed.statistics import auc
from jaxmed.tokens import TokenizedExample, prompt_ids
from tests import tiny
from tests.experiment_sets import BEHAVIOUR, TWINS


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


def test_a_pruned_model_is_fine_tuned_in_memory_and_never_written(plain_model: Model, masks: dict[str, Mask], tmp_path: Path) -> None:
    training = replace(TRAINING, rank=4, alpha=8.0, epochs=3.0, batch=2, warmup=1, learning_rate=1e-2)
    attack = Attack(BEHAVIOUR[:2], prefill=3, text="", trained=BEHAVIOUR[2:], training=training)
    rows = {(row["mask"], row["attack"]): row for row in run_attacks(plain_model, masks, attack).rows}
    assert [name for mask, name in rows if mask == "few"] == ["none", "prefill", "fine-tuned"]
    pruned = apply_mask(plain_model, masks["few"])
    by_hand = jm.finetune(pruned, BEHAVIOUR[2:], **asdict(training)).model
    encoded = encode(plain_model.tokenizer, BEHAVIOUR[:2])
    assert rows["few", "fine-tuned"]["generate_loss"] == pytest.approx(example_losses(by_hand, encoded).mean())
    assert rows["few", "fine-tuned"]["generate_loss"] < rows["few", "none"]["generate_loss"]
    attacked = fine_tuned(pruned, attack)
    assert attacked.identity != by_hand.identity
    with pytest.raises(jm.UserError, match="attack"):
        jm.export_folder(attacked, tmp_path / "out")
    with pytest.raises(jm.UserError, match="trained on and measured"):
        run_attacks(plain_model, masks, replace(attack, trained=BEHAVIOUR[1:]))


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
    attack += ["--train", files["good"], "--train-rank", "2", "--train-epochs", "1"]
    assert main([*attack, "--out", str(tmp_path / "a")]) == 0
    assert len((tmp_path / "a" / "attacks.csv").read_text().splitlines()) == 1 + 2 * 5
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".csv", ".html", ".json"}  # no weights are written
    assert main([*attack, "--out", str(tmp_path / "a2"), "--refusal-q", "2"]) == 2
    assert not (tmp_path / "a2").exists()


def read_scores_mask(folder: Path, file: Path) -> Path:
    """A mask file of the scores in a folder."""
    from jaxmed.pruning import read_scores

    write_mask(select(read_scores(folder), Rule(q=0.05, p=0.01)), file)
    return file
