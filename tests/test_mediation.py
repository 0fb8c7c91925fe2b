"""The study of mediation: on models whose mechanism is known it finds where, by what, and whether it is a gate."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.errors import UserError
from jaxmed.results import open_results
from jaxmed.studies import claims
from jaxmed.studies.mediation import joint_sets, make_mediation, run_mediation
from jaxmed.studies.mediation_spec import MediationSpec

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
    mlps = found["MLPs carry more of it than attention"]
    of_words = found["the total is of the behaviour, not of any change of words"]
    assert of_words["verdict"] == "supported"
    if name == "gate":  # a head of layer 0 reads, MLPs 1 and 3 carry: everything goes through all three
        assert found["the group gates the effect of the strongest earlier mlp_out"]["verdict"] == "supported"
        assert abs(float(mlps["estimate"])) < 0.05
    else:  # a head copies, no MLP has a part in it
        assert mlps["verdict"] == "not supported"
        assert float(mlps["estimate"]) == pytest.approx(-1, abs=0.1)
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
