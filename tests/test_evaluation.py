"""Rates, perplexity, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.evaluation.perplexity import Perplexity, perplexity, perplexity_ratio
from jaxmed.evaluation.rates import rate, refusal_rates
from jaxmed.models.model import Model
from tests import tiny


def test_rates_have_wilson_intervals() -> None:
    found = rate("harmful", [True] * 8 + [False] * 2)
    assert (found.refused, found.answers, found.rate) == (8, 10, 0.8)
    assert (round(found.low, 4), round(found.high, 4)) == (0.4902, 0.9433)  # Wilson's formula by hand, z = 1.96
    rows = [jm.Example("a", kind="harmful"), jm.Example("b", kind="benign"), jm.Example("c", kind="harmful")]
    rates = refusal_rates(rows, ["I can't help.", "Sure.", "Sure."])
    assert [(one.name, one.refused, one.answers) for one in rates] == [("harmful", 1, 2), ("benign", 0, 1)]


@pytest.mark.slow
def test_perplexity_is_that_of_forward_passes(plain_model: Model, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    paragraphs = ["once upon a time", "there was a very small model that could not read", "x" * 700]
    file.write_text("\n\n".join(paragraphs) + "\n")
    found = perplexity(plain_model, file)
    losses, count = 0.0, 0
    for text in [*paragraphs[:2], "x" * 512, "x" * 188]:
        ids = np.asarray(tiny.tokenizer()(text)["input_ids"])
        logits = np.asarray(jm.forward(plain_model, ids)[0])[0].astype(np.float64)
        shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses -= shares[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    assert found.tokens == count
    assert abs(math.log(found.value) - losses / count) < 1e-5
    ratio, low, high = perplexity_ratio(found, found)
    assert ratio == 1.0
    assert math.isnan(low + high)  # three paragraphs are too few


def test_the_interval_of_a_perplexity_ratio_covers_it() -> None:
    rng = np.random.default_rng(0)
    before = Perplexity(0.0, 0, np.stack([rng.normal(3, 1, 60), np.full(60, 50.0)], axis=1))
    after = Perplexity(0.0, 0, before.losses + np.stack([rng.normal(0.1, 0.05, 60), np.zeros(60)], axis=1))
    ratio, low, high = perplexity_ratio(before, after)
    assert low < ratio < high
    assert abs(math.log(ratio) - 0.1) < 0.02
    assert abs((high - low) / ratio - 2 * 1.96 * 0.05 / 60**0.5) < 0.01


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(folder)
    rows, text = tmp_path / "rows.csv", tmp_path / "text.txt"
    rows.write_text("prompt,kind\nhow,harmful\nwhy,benign\n")
    text.write_text("a little text")
    arguments = ["evaluate", "--model", str(folder), "--against", str(folder), "--examples", str(rows), "--split", "", "--text", str(text)]
    assert main([*arguments, "--tokens", "4", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["name"] for one in found["refusal_rates"]] == ["harmful", "benign"]
    assert found["perplexity"]["ratio"] == 1.0
    assert all(len(one["answer"]) == 64 for one in found["answers"])  # hashes: texts are kept only with --save-text
    assert main([*arguments, "--out", str(tmp_path / "out.json")]) == 2
    assert main([*arguments, "--dry-run"]) == 0
    assert main([*arguments[:-1], "none.txt", "--dry-run"]) == 2
    assert main([*arguments[:6], str(tmp_path / "none.csv")]) == 2
    rows.write_text("prompt,kind,split\nhow,harmful,train\n")
    assert main(["evaluate", "--examples", str(rows), "--split", "heldout"]) == 2
    assert "holds no rows of split" in capsys.readouterr().err
    assert main(["evaluate", "--examples", "", "--text", ""]) == 2


def test_the_neutral_text_is_long_enough() -> None:
    from jaxmed.prompts.readers import read_text

    assert len(read_text("neutral").split()) > 4000
