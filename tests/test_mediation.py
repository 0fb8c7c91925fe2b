"""The study of mediation: on models whose mechanism is known it finds where, by what, and whether it is a gate."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.bench.shapes import SHAPES
from jaxmed.cli.main import main
from jaxmed.errors import UserError
from jaxmed.models.load import from_params
from jaxmed.models.params import random_params
from jaxmed.prompts import read_pairs
from jaxmed.results import open_results
from jaxmed.studies import claims
from jaxmed.studies.mediation import joint_sets, make_mediation, mediation_steps, run_mediation
from jaxmed.studies.mediation_spec import MediationSpec
from tests.processes import end_at, finish

SPEC: dict[str, Any] = {"read_at": "-2", "windows": (8,), "draws": 1, "tokens": 0}


@pytest.fixture(scope="module", params=["gate", pytest.param("copy", marks=pytest.mark.slow)])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A study of a planted model: its name, the job, the folder."""
    planted, out = jm.planted(request.param), tmp_path_factory.mktemp("mediation") / "run"
    pairs = [pair for pair in planted.pairs if not pair.control]
    controls = [pair for pair in planted.pairs if pair.control]
    job = make_mediation(planted.model, pairs, controls, MediationSpec(**SPEC), "logit-diff", "text")
    run_mediation(job, out)
    return request.param, job, out


def _verdicts(out: Path) -> dict[str, dict[str, str]]:
    with (out / "verdicts.csv").open(encoding="utf-8") as file:
        return {row["claim"]: row for row in csv.DictReader(file)}


def test_claims_agree_with_what_was_planted(study: tuple[str, Any, Path]) -> None:
    name, _, out = study
    found = _verdicts(out)
    mlps = found["MLPs of late layers carry more of it than attention there"]
    of_words = found["the total is of the behaviour, not of any change of words"]
    assert of_words["verdict"] == "supported"
    if name == "gate":  # a head of layer 0 reads, MLPs 1 and 3 carry
        assert found["the group gates the effect of the strongest earlier mlp_out"]["verdict"] == "supported"
        assert mlps["verdict"] == found["late layers carry it"]["verdict"] == "supported"
        assert float(mlps["estimate"]) == pytest.approx(1, abs=0.05)
    else:  # a head of layer 1 copies: the thirds are layers 0 and 1, 2, and 3
        assert mlps["verdict"] != "supported"
        assert found["late layers carry it"]["verdict"] == "not supported"
        assert found["the MLP of layer 3 carries part of the effect"]["verdict"] == "not supported"


def test_joint_patches_are_those_of_whole_thirds(study: tuple[str, Any, Path]) -> None:
    _, job, out = study
    table = open_results(out / "writing").load()
    pair = job.gate.pairs[0]
    for one in joint_sets(job.model.config.layers):
        wanted = jm.patch(job.model, pair, one.units, "logit-diff", "last", form="text").effect
        assert float(table.joint.sel(set=one.name)[0]) == pytest.approx(wanted, abs=1e-4)


def test_a_finished_study_is_resumed_redrawn_and_kept_from_another(
    study: tuple[str, Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, job, out = study
    before = (out / "verdicts.csv").read_bytes()
    assert sum(step.cost.passes for step in mediation_steps(job)) > 0
    assert sum(step.cost.passes for step in mediation_steps(job, done=out)) == 0
    run_mediation(job, out, resume=True)
    assert (out / "verdicts.csv").read_bytes() == before
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Joint patches" in page
    assert "How many neurons are enough" in page
    assert len(page) < 3e6
    pairs = [pair for pair in job.gate.pairs]
    other = make_mediation(job.model, pairs, [], MediationSpec(**SPEC), "logit-diff", "text")
    with pytest.raises(UserError, match="another request"):
        run_mediation(other, out, resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        run_mediation(job, out)
    capsys.readouterr()


def _made(late: float, early: float, groups: int = 12) -> dict[str, np.ndarray]:
    spread = np.linspace(0.9, 1.1, groups)
    found = {"total": 8 * spread, "late": 8 * late * spread, "early": 8 * early * spread}
    return found | {"both_out": np.outer(spread, [early, 0.0, late])}


def test_claims_follow_from_joint_effects() -> None:
    ask = claims._difference
    assert ask("c", _made(0.6, 0.1), "late", "early").verdict == "supported"
    assert ask("c", _made(0.6, 0.1), "early", "late").verdict == "not supported"
    assert ask("c", _made(0.6, 0.1, groups=5), "late", "early").verdict == "undecided", "five groups have no interval"
    noisy = _made(0.3, 0.3)
    noisy["late"] = noisy["late"] * np.where(np.arange(12) % 2, 3.0, -1.0)
    assert ask("c", noisy, "late", "early").verdict == "undecided"
    assert claims._two_stages(_made(0.1, 0.8), _made(0.7, 0.1)).verdict == "supported"
    assert claims._two_stages(_made(0.8, 0.1), _made(0.7, 0.1)).verdict == "not supported", "the request is read late"
    total = np.linspace(0.9, 1.1, 12)
    assert claims._of_the_behaviour(total, total * 0.1).verdict == "supported"
    assert claims._of_the_behaviour(total, total * 2).verdict == "not supported"
    assert claims._of_the_behaviour(total, np.concatenate([total[:6] * 9, -total[6:] * 9])).verdict == "undecided"
    centres = [one.estimate for one in claims._profiles(_made(0.1, 0.8), _made(0.7, 0.1))]
    assert centres == pytest.approx([2 * 0.1 / 0.9, 2 * 0.7 / 0.8])


@pytest.mark.slow
def test_an_absent_behaviour_is_said_and_nothing_is_divided(tmp_path: Path) -> None:
    planted = jm.planted("gate")
    controls = [pair for pair in planted.pairs if pair.control]
    pairs = [jm.PromptPair(**{**vars(pair), "control": ""}) for pair in controls]
    job = make_mediation(planted.model, pairs, [], MediationSpec(**SPEC), "logit-diff", "text")
    run_mediation(job, tmp_path / "run")
    found = _verdicts(tmp_path / "run")
    kept = {row["verdict"] for row in found.values()} - {"described"}
    assert kept == {"behaviour absent in this model"}
    assert "the total is of the behaviour, not of any change of words" not in found, "without control pairs nobody can say"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A study of a planted model from the command line, but for --out."""
    planted, folder = jm.planted("gate"), tmp_path_factory.mktemp("planted")
    jm.export_folder(planted.model, folder / "model")
    for name, kept in (("pairs", False), ("controls", True)):
        rows = [
            {key: getattr(pair, key) for key in ("id", "base", "source", "target", "foil", "category", "group")}
            for pair in planted.pairs
            if bool(pair.control) == kept
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model": folder / "model", "pairs": folder / "pairs.jsonl", "controls": folder / "controls.jsonl", "form": "text"}
    flags |= {"outcome": "logit-diff", "read-at": "-2", "windows": 8, "draws": 1, "tokens": 2, "text": ""}
    return ["study", "mediation", *(str(part) for flag, value in flags.items() for part in (f"--{flag}", value))]


@pytest.mark.slow
def test_a_killed_study_is_resumed_to_the_same_answers(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL and SIGTERM at moments while sweeps, joint patches and answers run."""
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert "the group gates the effect" in capsys.readouterr().out
    run, folder = [*command, "--out", str(tmp_path / "run"), "--resume"], tmp_path / "run" / "gate"
    end_at(run, ((signal.SIGTERM, folder / "half1"), (signal.SIGKILL, folder / "answers.csv")))
    finish(run)
    for name in ("verdicts.csv", "gate/gate.csv", "gate/answers.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_command_plans_and_refuses(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main([*command, *out, "--dry-run"]) == 0
    assert "in all" in capsys.readouterr().out
    for flags, said in (
        (["--read-at", "each"], "--read-at each names one after another"),
        (["--controls", "nowhere"], "nowhere"),
        (["--control-layer", "9"], "layers 0 to 3"),
        (["--judge", "http"], "endpoint"),
    ):
        assert main([*command, *out, *flags]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_study_of_eight_billion_weights_is_planned_without_them(smol: Any) -> None:
    config = replace(SHAPES["llama-3.1-8b"], dtype="bfloat16")
    shapes = jax.eval_shape(lambda: random_params(config, 0, jm.make_mesh("data=1")))
    model = from_params(config, shapes, jm.make_mesh("data=1"), "llama-3.1-8b", smol)
    job = make_mediation(model, read_pairs("harm")[:8], read_pairs("control")[:4], MediationSpec(windows=(128,), shuffles=19))
    costs = {step.name: step.cost for step in mediation_steps(job)}
    per_token = 2 * config.layers * config.layer_weights
    modules = 3 * config.layers * 8
    assert costs["writing"].flops > modules * per_token / 2, "a module of the middle layer restarts half of the blocks"
    assert costs["gate"].passes > 8 * 2 * config.neurons, "every neuron of two layers, for every pair"
    assert job.gate.stand_in(0).chunk, "the joint sweep is planned too"
