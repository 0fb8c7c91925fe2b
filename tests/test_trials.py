"""The loop of experiments, the steps of studies, and the warnings of masks that break a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.mask import curve_ratio, warnings_of
from jaxmed.experiments.table import Table
from jaxmed.experiments.trials import Trial, beside_random, run_trials
from jaxmed.models.model import Model
from jaxmed.pruning import Mask, Rule
from jaxmed.runs.cost import Cost
from jaxmed.runs.legal import digests_of
from jaxmed.studies.pruning import PruningStudy
from jaxmed.studies.steps import Step, run_steps


def _trials(made: list[str], *names: str) -> list[Trial]:
    def make(name: str) -> Model:
        made.append(name)
        return cast(Model, name)

    return [Trial((name, 0), lambda name=name: make(name), {"about": name.upper()}) for name in names]


def _measure(trial: Trial, model: Model) -> dict[str, Any]:
    return {"length": len(cast(str, model))}


def test_every_trial_is_a_row_of_key_facts_and_measurement() -> None:
    table = run_trials(_trials([], "a", "bcd"), _measure, Table(("mask", "seed")))
    assert table.rows == [{"mask": "a", "seed": 0, "about": "A", "length": 1}, {"mask": "bcd", "seed": 0, "about": "BCD", "length": 3}]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_loop_makes_no_model_again(stop: int, tmp_path: Path) -> None:
    names, made = ("a", "bb", "ccc", "dddd"), []

    def interrupt(row: Any) -> None:
        if len(made) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trials(_trials(made, *names), _measure, Table(("mask", "seed"), tmp_path / "t.csv", interrupt))
    assert made == list(names[:stop])
    table = run_trials(_trials(made, *names), _measure, Table(("mask", "seed"), tmp_path / "t.csv"))
    assert made == list(names)
    assert table.rows == run_trials(_trials([], *names), _measure, Table(("mask", "seed"))).rows


def _mask(count: int, tag: str = "") -> Mask:
    return Mask({"a": np.arange(count)}, {"a": (100, 1000)}, "some model", "identity", {}, tag)


def test_random_masks_stand_beside_every_mask_with_its_counts() -> None:
    found = list(beside_random({"few": _mask(2), "many": _mask(50)}, 2))
    assert [key for key, _ in found] == [
        (name, seed) for one in ("few", "many") for name, seed in ((one, 0), (f"random like {one}", 0), (f"random like {one}", 1))
    ]
    assert [mask.count for _, mask in found] == [2, 2, 2, 50, 50, 50]


def _step(name: str, *needs: str, done: list[str] | None = None) -> Step:
    return Step(name, needs, Cost(name), lambda folder: (done if done is not None else folder).append(name))


def test_steps_run_in_their_order() -> None:
    done: list[str] = []
    run_steps([_step("scores"), _step("curves", "scores"), _step("compression", "curves")], done)
    assert done == ["scores", "curves", "compression"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([_step("curves", "scores"), _step("scores")], "does not come before it"),
        ([_step("scores"), _step("scores")], "comes twice"),
        ([_step("curves", "curves")], "does not come before it"),
    ],
)
def test_steps_that_cannot_be_ordered_are_refused_before_one_runs(steps: list[Step], message: str) -> None:
    done: list[str] = []
    with pytest.raises(jm.UserError, match=message):
        run_steps(steps, done)
    assert done == []


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ({"models": ("a", "b")}, ("a", "b")),
        ({"models": ("a", "a"), "revisions": ("", "step-100")}, ("a", "a@step-100")),
        (
            {"models": ("a", "a", "a"), "adapters": ("", "x/tuned", ""), "masks": ("", "", "y/rude.safetensors")},
            ("a", "a + tuned", "a - rude"),
        ),
    ],
)
def test_stages_of_one_model_have_names_of_their_own(given: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert PruningStudy(**given).labels == labels


def test_values_for_another_number_of_models_are_refused() -> None:
    with pytest.raises(jm.UserError, match="--revisions has 1 values for 2 models"):
        _ = PruningStudy(models=("a", "b"), revisions=("x",)).labels


# Masks that break a model


def _curve(folder: Path, ratios: dict[float, float], digest: str = "scores") -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"manifest": {"scored_by": digest}}))
    rows = [f"signed,{q},0,{ratio}" for q, ratio in ratios.items()] + ["random,0.001,0,1.0"]
    (folder / "curve.csv").write_text("\n".join(["rule,q,seed,perplexity_ratio", *rows]) + "\n")
    return folder


class _Scores:
    digest = "scores"


def test_the_curve_says_what_a_share_costs(tmp_path: Path) -> None:
    folder = _curve(tmp_path / "curve", {1e-4: 1.0, 1e-2: 100.0})
    assert curve_ratio(folder, _Scores(), Rule(q=1e-3)) == pytest.approx(10.0)
    assert curve_ratio(folder, _Scores(), Rule(q=1e-4)) == pytest.approx(1.0)
    assert curve_ratio(folder, _Scores(), Rule(q=0.5)) == pytest.approx(100.0)  # beyond the curve: its end
    assert np.isnan(curve_ratio(folder, _Scores(), Rule(q=1e-3, score="positive")))
    noted = {"manifest": {"scored_by": "scores"}, "status": "finished", "tables": digests_of(folder, ["curve.csv"])}
    (folder / "run.json").write_text(json.dumps(noted))
    assert curve_ratio(folder, _Scores(), Rule(q=1e-3)) == pytest.approx(10.0)
    (folder / "curve.csv").write_text((folder / "curve.csv").read_text().replace("100.0", "900.0"))
    with pytest.raises(jm.UserError, match=r"curve\.csv holds other bytes"):
        curve_ratio(folder, _Scores(), Rule(q=1e-3))
    with pytest.raises(jm.UserError, match="of other scores"):
        curve_ratio(_curve(tmp_path / "other", {1e-4: 1.0}, "others"), _Scores(), Rule())
    with pytest.raises(jm.UserError, match="holds no curve"):
        curve_ratio(tmp_path, _Scores(), Rule())


@pytest.mark.parametrize(
    ("count", "rule", "ratio", "warned"),
    [
        (5, Rule(), None, False),
        (50, Rule(), None, True),
        (50, Rule(score="random"), None, False),
        (50, Rule(), 1.02, False),
        (5, Rule(), 1.5, True),
        (50, Rule(), float("nan"), True),
    ],
)
def test_masks_that_break_a_model_are_warned_of(count: int, rule: Rule, ratio: float | None, warned: bool) -> None:
    found = warnings_of(_mask(count), rule, ratio)
    assert bool(found) == warned
    assert all(line.startswith("warning: ") and "smaller --q" in line for line in found)
