"""Curves of pruning: first-order predictions, resuming, compression, and their figure."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.scoring import example_losses
from jaxmed.experiments.compression import HALVED, Curve, at_fraction, compression_rows, q50, read_curve
from jaxmed.experiments.curve import CurveRequest, predicted_rise, run_curve
from jaxmed.experiments.measure import make_tests, measure
from jaxmed.experiments.table import Examples, Table
from jaxmed.models.model import Model
from jaxmed.models.named_weights import weights_by_name
from jaxmed.pruning import Mask, Rule, select
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.scores import Scores, score
from jaxmed.reports.curves import draw_pruning_curve
from tests.experiment_sets import BEHAVIOUR, TWINS


@pytest.fixture(scope="module")
def scores(plain_model: Model) -> Scores:
    return score(plain_model, BEHAVIOUR, TWINS)


@pytest.fixture(scope="module")
def masks(scores: Scores) -> dict[str, Mask]:
    return {"few": select(scores, Rule(q=0.02, p=0.01)), "more": select(scores, Rule(q=0.2, p=0.01))}


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
