"""Read-outs of replies: they find what they were fitted on, keep to one model, and say nothing of empty replies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.errors import UserError
from jaxmed.evaluation import readout
from jaxmed.statistics import auc

GOOD = [jm.Example(f"ask {i}", f"yes {'abc'[i % 3] * 4} {i}", split=("train", "heldout")[i % 4 == 0]) for i in range(48)]
BAD = [jm.Example(f"ask {i}", f"no {'xyz'[i % 3] * 4} {i}!", split=("train", "heldout")[i % 4 == 0]) for i in range(48)]


@pytest.fixture(scope="module")
def fitted(plain_model: jm.Model) -> readout.Readout:
    return readout.fit_readout(plain_model, GOOD, BAD)


def test_held_out_replies_are_told_apart(plain_model: jm.Model, fitted: readout.Readout) -> None:
    held = [row for row in (*GOOD, *BAD) if row.split == "heldout"]
    scores = fitted.scores(plain_model, held, [row.response for row in held])
    good = np.asarray([row in GOOD for row in held])
    area = auc(scores[good, 0], scores[~good, 0])
    assert area == pytest.approx(fitted.shown["alignment"][0])
    assert area > 0.95
    assert ((scores >= 0) & (scores <= 1)).all()


def test_a_reply_scores_the_same_alone_and_among_others(plain_model: jm.Model, fitted: readout.Readout) -> None:
    """The mean stream and the fluency are those of a forward of the whole text, whatever shares its rows."""
    rows, layer = GOOD[:5], fitted.layer
    found = readout.reply_features(plain_model, rows, layer, "chat")
    fluency = readout.measure_qualities(plain_model, rows, "chat")["fluency"]
    for row, mean, one in zip(rows, found, fluency, strict=True):
        example = jm.tokens.encode_example(plain_model.tokenizer, row, "chat")
        logits, taps = jm.forward(plain_model, example.ids[None], taps=("residual_out",))
        behind = np.asarray(taps["residual_out"])[layer - 1, 0, example.prompt - 1 : -1]
        np.testing.assert_allclose(mean, behind.mean(axis=0), atol=1e-4)
        logits = np.asarray(logits)[0, example.prompt - 1 : -1].astype(np.float64)
        own = logits[np.arange(len(logits)), example.ids[example.prompt :]] - np.log(np.exp(logits).sum(axis=1))
        assert one == pytest.approx(own.mean(), abs=1e-4)


def test_the_direction_is_the_discriminant() -> None:
    """Two Gaussian kinds whose covariance is diagonal: the best direction is the difference of means over the variances."""
    rng = np.random.default_rng(0)
    spread, apart = np.asarray([1.0, 3.0, 0.5]), np.asarray([1.0, 1.0, 1.0])
    label = np.arange(4000) < 2000
    x = rng.normal(size=(4000, 3)) * spread + np.where(label, 1, 0)[:, None] * apart
    found, best = readout.discriminant(x, label), apart / spread**2
    assert found @ best / np.linalg.norm(found) / np.linalg.norm(best) > 0.995


def test_a_curve_is_a_probability_at_equal_classes() -> None:
    """Logistic data: the fitted curve is the true posterior."""
    rng = np.random.default_rng(1)
    better, worse = rng.normal(loc=1.0, size=4000), rng.normal(loc=-1.0, size=4000)
    curve = readout.fit_curve(better, worse)
    x = np.linspace(-2, 2, 9)
    np.testing.assert_allclose(curve(x), 1 / (1 + np.exp(-2 * x)), atol=0.03)


def test_spoilt_replies_are_spoilt_in_their_respect(plain_model: jm.Model) -> None:
    rows = [replace(row, response=f"{row.response} and the other thing {at} of it") for at, row in enumerate(GOOD[:12])]
    found = readout.spoil(plain_model, rows, "chat", 0)
    assert set(found) == set(readout.QUALITIES)
    whole, looped = found["variety"]
    assert (looped < whole).all()
    assert readout.other_prompts(rows)[-1] == rows[0].prompt
    assert readout.other_prompts([rows[0]]) == [rows[0].prompt]


def test_empty_replies_other_models_and_few_rows(plain_model: jm.Model, fitted: readout.Readout) -> None:
    scores = fitted.scores(plain_model, GOOD[:2], [" ", "yes aaaa"])
    assert tuple(scores[0]) == readout.EMPTY
    assert scores[1, 0] != readout.EMPTY[0]
    tuned = jm.finetune(plain_model, GOOD, steps=1, batch=4, rank=2).model
    with pytest.raises(UserError, match="fitted on other weights"):
        fitted.scores(tuned, GOOD[:1], ["yes"])
    with pytest.raises(UserError, match="at least"):
        readout.fit_readout(plain_model, GOOD[:9], BAD)
    with pytest.raises(UserError, match="layer is 9"):
        readout.fit_readout(plain_model, GOOD, BAD, layer=9)


def test_read_outs_are_kept(fitted: readout.Readout, tmp_path: Path) -> None:
    readout.write_readout(tmp_path / "readout.json", fitted)
    again = readout.read_readout(tmp_path / "readout.json")
    assert again.direction == fitted.direction
    assert (again.alignment, again.coherence, again.model) == (fitted.alignment, fitted.coherence, fitted.model)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="holds no read-outs"):
        readout.read_readout(tmp_path / "other.json")
