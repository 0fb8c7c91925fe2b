"""Screened sweeps: exact where they say so, estimates elsewhere, unbiased statistics, budgets that are kept, runs that go on."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import jaxmed as jm
from jaxmed import results
from jaxmed.cli import method as command
from jaxmed.cli.main import main
from jaxmed.effects import job as jobs
from jaxmed.effects import screen
from jaxmed.effects.cost import plan
from jaxmed.effects.job import make_job
from jaxmed.effects.request import Request
from jaxmed.effects.shapes import shapes_of
from jaxmed.effects.sweep import run_sweep
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.runs.cost import propagate_flops
from jaxmed.runs.folder import read_run
from jaxmed.statistics.screening import corrected
from tests import tiny

UNITS = ("neuron", "window", "head_out", "mlp_out")
HOW: dict[str, Any] = {"unit": UNITS, "window": 8, "budget": "40%", "top": 5}


@pytest.fixture(autouse=True)
def _screen_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of a handful of units are screened as well."""
    monkeypatch.setattr(jobs, "FEW", 0)


def _swept(model: Model, pairs: Any, method: str, **how: Any) -> xr.Dataset:
    return jm.sweep(model, pairs, method=method, **{**HOW, **how})


def _check(model: Model, pairs: Any, tolerance: float = 2e-5, **how: Any) -> None:
    """Values where verified equal exact effects, others equal the estimates, and neither of the two is all there is."""
    found, exact, estimate = (_swept(model, pairs, method, **how) for method in ("screened", "exact", "attribution"))
    for unit in UNITS:
        verified = found[f"{unit}_verified"].values.astype(bool)
        verified = np.broadcast_to(verified, found[unit].shape)
        there = np.isfinite(exact[unit].values)
        assert (there == np.isfinite(found[unit].values)).all()
        assert not verified[~there].any()
        largest = np.abs(exact[unit].values[there]).max()
        assert largest > 1e-2
        assert np.abs(found[unit].values - exact[unit].values)[verified].max(initial=0) <= tolerance * max(largest, 1)
        assert np.abs(found[unit].values - estimate[unit].values)[there & ~verified].max(initial=0) <= tolerance * max(largest, 1)
        assert np.abs(found[f"{unit}_estimate"].values - estimate[unit].values)[there].max() <= tolerance * max(largest, 1)
        assert unit != "neuron" or 0 < verified.sum() < there.sum()
        assert (found[f"{unit}_error"].values[verified] == 0).all()


@pytest.mark.parametrize(
    "kind", ["llama", "mixture", *(pytest.param(one, marks=pytest.mark.slow) for one in ("post_norm", "four_norms", "windowed_biased"))]
)
def test_values_are_exact_or_estimates_as_told(kind: str) -> None:
    _check(tiny.model(kind), tiny.PAIRS[:2])


@pytest.mark.parametrize("position", ["each", pytest.param("user", marks=pytest.mark.slow)])
def test_rows_of_several_tokens_share_chunks(plain_model: Model, position: str) -> None:
    _check(
        plain_model,
        tiny.PAIRS[:1] if position == "user" else tiny.PAIRS[1:2],
        position=position,
        budget="15%" if position == "each" else "40%",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"outcome": ("prefix-gap", "sequence-logprob")}, {"patch": "mean"}, {"patch": "zero"}, {"direction": "reverse"}]
)
def test_outcomes_patches_and_directions(plain_model: Model, changed: dict[str, Any]) -> None:
    _check(plain_model, tiny.LONG[:2] if "outcome" in changed else tiny.PAIRS[:2], **changed)


@pytest.mark.slow
def test_two_devices_find_what_one_finds() -> None:
    one, two = (_swept(tiny.model("llama", mesh=mesh), tiny.PAIRS[:1], "screened") for mesh in ("data=1", "data=2"))
    for unit in UNITS:
        assert np.abs(one[f"{unit}_estimate"].values - two[f"{unit}_estimate"].values).max() <= 1e-5
        same = (one[f"{unit}_verified"] == two[f"{unit}_verified"]).values
        assert same.mean() > 0.9  # ties of rounding apart
        assert np.abs(one[unit].values - two[unit].values)[same].max() <= 1e-5


def test_a_whole_budget_leaves_nothing_unknown(plain_model: Model) -> None:
    found = _swept(plain_model, tiny.PAIRS[:1], "screened", budget="100%")
    for unit in UNITS:
        assert found[f"{unit}_verified"].values.all()
        assert (found[f"{unit}_probability"].values == 1).all()
        assert found[f"{unit}_recall"].values == found[f"{unit}_recall_low"].values == 1


def test_few_units_are_all_computed(plain_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "FEW", 3 * 4)
    found = _swept(plain_model, tiny.PAIRS[:1], "screened", budget="10%")
    assert found.head_out_verified.values.all()
    assert found.mlp_out_verified.values.all()
    assert 0 < found.neuron_verified.values.mean() < 0.5


def test_statistics_are_of_the_difference_estimator(plain_model: Model, tmp_path: Path) -> None:
    pairs = [replace(tiny.PAIRS[i % 3], id=f"pair {i}") for i in range(12)]
    found = _swept(plain_model, pairs, "screened", budget="30%", out=tmp_path / "run")
    values = corrected(found.neuron.values, found.neuron_estimate.values, found.neuron_probability.values)
    assert np.abs(values - found.neuron.values).max() > 1e-3
    assert np.allclose(found.neuron_mean.values, values.mean(0), atol=1e-6)
    with (tmp_path / "run" / "top.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    first = rows[0]
    exact = found.neuron_verified.values[:, int(first["layer"]), int(first["index"])].sum()
    assert first["verified"] == f"{exact}/12"
    assert first["method"] == "screened"


def test_drawn_probabilities_make_means_unbiased(plain_model: Model) -> None:
    """The same pair under many seeds: the mean of what statistics take is the exact effect."""
    exact = _swept(plain_model, tiny.PAIRS[:1], "exact", unit="neuron").neuron.values[0]
    pairs = [replace(tiny.PAIRS[0], id=str(seed)) for seed in range(80)]
    found = _swept(plain_model, pairs, "screened", unit="neuron", budget="30%")
    values = corrected(found.neuron.values, found.neuron_estimate.values, found.neuron_probability.values)
    error = values.std(0, ddof=1) / np.sqrt(len(pairs))
    drawn = (found.neuron_verified.values.mean(0) > 0.05) & (found.neuron_verified.values.mean(0) < 0.95)
    assert drawn.sum() > 10
    assert np.abs((values.mean(0) - exact)[drawn].sum()) <= 4 * np.sqrt((error[drawn] ** 2).sum())


class _Stop(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_bytes(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(plain_model, tiny.PAIRS, Request(units=("neuron", "head_out"), method="screened", top=5, budget="30%"))
    run_sweep(job, tmp_path / "whole")
    commit, seen = screen.Screen.chunks, []

    def stop(self: Any) -> Any:
        seen.append(self)
        if len(seen) == 2:
            raise _Stop
        return commit(self)

    monkeypatch.setattr(screen.Screen, "chunks", stop)
    with pytest.raises(_Stop):
        run_sweep(job, tmp_path / "halves")
    monkeypatch.setattr(screen.Screen, "chunks", commit)
    run_sweep(job, tmp_path / "halves", resume=True)
    one, two = (results.open_results(tmp_path / name) for name in ("whole", "halves"))
    for name in one.data_vars:
        assert one[name].values.tobytes() == two[name].values.tobytes(), name
    assert sum(session["passes"] for session in read_run(tmp_path / "halves")["sessions"]) > 0


def test_rows_stay_within_the_budget(plain_model: Model) -> None:
    job = make_job(plain_model, tiny.PAIRS[:1], Request(units=("neuron",), position="each", method="screened", top=5, budget="10%"))
    found = jm.sweep(plain_model, tiny.PAIRS[:1], position="each", method="screened", top=5, budget="10%")
    taken, there = found.neuron_verified.values[0].sum(1), np.isfinite(found.neuron.values[0]).sum(1)
    shapes, layers = shapes_of(job.contrasts[0]), plain_model.config.layers - np.arange(plain_model.config.layers)
    cost = layers[:, None] * [propagate_flops(plain_model.config, 1, shape.window, shape.seen, 1) for shape in shapes]
    assert 0.07 * (there * cost).sum() <= (taken * cost).sum() <= 0.11 * (there * cost).sum()
    assert 0.5 * plan(job).cost.passes < taken.sum() + 3 < 3 * plan(job).cost.passes


@pytest.mark.parametrize(("budget", "part"), [("2%", 0.02), ("100 %", 1.0), ("1e30 flop", 1.0), ("60s", None), ("2h", None)])
def test_budgets_of_every_kind(plain_model: Model, budget: str, part: float | None) -> None:
    job = make_job(plain_model, tiny.PAIRS[:1], Request(method="screened", budget=budget))
    assert job.chunk[jobs.BUDGET] == (job.chunk[jobs.BUDGET] if part is None else round(part * 1e6))
    assert 0 < job.chunk[jobs.BUDGET] <= 1e6


@pytest.mark.parametrize("budget", ["", "two", "0%", "-1%", "101%", "5", "1e400s", "1.2.3s", "nan%"])
def test_other_budgets_are_refused(plain_model: Model, budget: str) -> None:
    with pytest.raises(UserError, match=r"is not understood\. Give a part of the exact"):
        make_job(plain_model, tiny.PAIRS[:1], Request(method="screened", budget=budget))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"outcomes": ("kl",)}, "does not take .kl."),
        ({"estimands": ("direct",)}, "estimates indirect effects"),
    ],
)
def test_what_cannot_be_screened_is_refused(plain_model: Model, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_job(plain_model, tiny.PAIRS[:1], Request(method="screened", **changed))


def test_long_sweeps_are_screened_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pairs = tiny.write_checkpoint(tmp_path / "model"), tmp_path / "pairs.jsonl"
    tiny.tokenizer().save_pretrained(folder)
    pairs.write_text("".join(f'{{"id": "{i}", "base": "a {i}", "source": "b {i}", "target": "S", "foil": "N"}}\n' for i in range(2)))
    flags = ["sweep", "--model", str(folder), "--pairs", str(pairs), "--top", "5", "--budget", "40%"]
    monkeypatch.setattr(command, "SHORT", 0.0)
    assert main([*flags, "--out", str(tmp_path / "long")]) == 0
    said = capsys.readouterr().out
    assert "--method screened is taken" in said
    assert "Of the 5 largest of a pair, computed (neuron)" in said
    assert results.open_results(tmp_path / "long").attrs["method"] == "screened"
    assert "1/2" in (tmp_path / "long" / "top.csv").read_text() or "2/2" in (tmp_path / "long" / "top.csv").read_text()
    assert main([*flags, "--out", str(tmp_path / "exact"), "--method", "exact"]) == 0
    assert main([*flags, "--out", str(tmp_path / "sets"), "--layer-window", "2"]) == 0
    assert results.open_results(tmp_path / "sets").attrs["method"] == "exact"
    monkeypatch.setattr(command, "SHORT", 600.0)
    assert main([*flags, "--out", str(tmp_path / "long"), "--resume"]) == 0
    assert main([*flags, "--out", str(tmp_path / "short")]) == 0
    assert results.open_results(tmp_path / "short").attrs["method"] == "exact"
    page = (tmp_path / "long" / "report.html").read_text()
    assert "Screened run: exact effects of" in page
    assert "neuron_estimate" not in page
