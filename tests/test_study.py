"""The study of pruning, end to end, on a tiny model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.cli.measure import MeasureFlags
from jaxmed.prompts.readers import read_text
from jaxmed.pruning import Rule, read_mask, read_scores, select
from jaxmed.runs import legal
from jaxmed.studies.pruning import PruningStudy
from tests import tiny
from tests.test_experiments import yes_no_model  # noqa: F401


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, yes_no_model: Any) -> list[str]:  # noqa: F811
    """A study of two models and two sets, but for --out."""
    folder = tmp_path_factory.mktemp("study")
    for name, seed in (("base", 0), ("tuned", 1)):
        tiny.write_checkpoint(folder / name, rope_theta=10000.0 * (1 + seed))
        yes_no_model.tokenizer.save_pretrained(folder / name)
    for name, answer in (("bad", "no"), ("control", "so"), ("good", "yes")):
        rows = [
            {
                "prompt": f"{name} {i}" + "x" * (i % 5),
                "response": f"{answer} {'abc'[i % 3]} {i}",
                "split": ("train", "heldout")[i % 2],
                "kind": "harmful",
            }
            for i in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(folder / f"{name}.jsonl") for name in ("bad", "control", "good")}
    asked = ["study", "pruning", "--models", str(folder / "base"), str(folder / "tuned"), "--text", "", "--q", "0.02", "--p", "0.01"]
    asked += ["--behaviours", files["bad"], "--controls", files["control"], "--preserve", files["good"], "--qs", "0.02", "0.2"]
    asked += ["--twins", files["good"], "--explanations", "", "--requests", files["bad"], "--refusals", files["bad"], "--tokens", "2"]
    return [*asked, "--refusal-q", "0.1", "--prefill", "2", "--refusal-examples", "6"]


def _tables(out: Path) -> dict[str, str]:
    return {str(file.relative_to(out)): file.read_text() for file in out.rglob("*.csv")}


def test_a_disk_without_room_for_the_scores_is_refused_first(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(legal.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10})())
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "its disk has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_limit_counts_the_harmful_requests_alone(tmp_path: Path) -> None:
    kinds = ("benign", "harmful", "benign", "harmful", "harmful")
    rows = [{"prompt": f"p{i}", "response": "no", "kind": kind, "split": "heldout"} for i, kind in enumerate(kinds)]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = PruningStudy(models=(), behaviours=("rude",), controls=(), test_limit=2, requests=str(file))
    assert [row.prompt for row in study.abilities.requests] == ["p1", "p3"]
    assert [row.prompt for row in MeasureFlags(limit=2).requests_of(str(file))] == ["p1", "p3"]


def test_the_short_text_is_every_other_paragraph() -> None:
    long, short = (read_text(name).strip().split("\n\n") for name in ("neutral", "neutral-short"))
    assert short == long[::2]
    assert len(short) == 30


@pytest.mark.slow
def test_a_study_runs_is_resumed_and_redrawn(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = tmp_path / "whole"
    assert main([*arguments, "--out", str(whole), "--dry-run"]) == 0
    assert not whole.exists()
    assert "besides loading" in capsys.readouterr().out
    assert main([*arguments, "--out", str(whole)]) == 0
    tables = _tables(whole)
    wanted = {f"model{i}/curve-{name}/{file}.csv" for i in range(2) for name in ("bad", "control") for file in ("curve", "examples")}
    assert set(tables) == wanted | {"transfer.csv", "dissociation.csv", "attacks.csv", "compression.csv"}
    rows = list(csv.DictReader(tables["compression.csv"].splitlines()))
    assert [row["behaviour"] for row in rows] == ["bad", "bad", "control", "control"]
    page = (whole / "report.html").read_text()
    assert all(title in page for title in ("Compression", "Transfer in", "Dissociation in", "under attack", "Curve of control"))
    mask = read_mask(whole / "model1" / "masks" / "control.safetensors")
    scores = [read_scores(whole / "model1" / f"scores-{name}") for name in ("control", "bad")]
    alone = select(scores[0], Rule(q=0.02, p=0.01), preserve=scores[1])
    assert all((mask.indices[name] == alone.indices[name]).all() for name in mask.indices)
    assert jm.load(arguments[3]).identity == read_mask(whole / "model0" / "masks" / "bad.safetensors").weights

    # interrupted in the middle of the second model, and continued
    from jaxmed.experiments import curve

    cut, seen = tmp_path / "cut", []

    def stop(*given: Any) -> Any:
        seen.append(given)
        if len(seen) == 16:  # 5 + 3 rows of curves and 4 of transfer in the first model; then the second one's
            raise KeyboardInterrupt
        return compare(*given)

    compare = curve.compare
    monkeypatch.setattr(curve, "compare", stop)
    assert main([*arguments, "--out", str(cut)]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(curve, "compare", compare)
    assert main([*arguments, "--out", str(cut)]) == 2
    assert main([*arguments, "--out", str(cut), "--resume"]) == 0
    assert _tables(cut) == tables

    # redrawn without the models
    again = tmp_path / "again.html"
    assert main(["report", str(whole), "--out", str(again)]) == 0
    assert again.read_text() == page
    assert main([*arguments, "--out", str(cut), "--resume", "--q", "0.05"]) == 2
    assert "0.05" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--behaviours", "nothing.jsonl"], "nothing.jsonl"),
        (["--q", "2"], r"q (2.0) is in (0, 1]"),
        (["--controls", "rude", "--behaviours", "rude"], "same name"),
        (["--behaviours", "ordinary", "--preserve", "ordinary"], "same name"),
        (["--against", "wanda", "--test-limit", "0"], "A limit of 0"),
        (["--question", "Is it?"], "same about every row"),
        (["--prefill", "0"], "needs one at least"),
    ],
)
def test_what_a_study_refuses(arguments: list[str], tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*arguments, *more, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_study_takes_baselines_that_read_other_scores(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    short = ["--models", arguments[3], "--refusals", "", "--twins", "", "--requests", ""]
    assert main([*arguments, *short, "--against", "absolute", "wanda", "--qs", "0.1", "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "model0" / "curve-bad" / "curve.csv").read_text().splitlines()))
    assert [row["rule"] for row in rows] == ["none", "signed", "absolute", "wanda"]


def test_rows_that_are_scored_are_not_tested(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"prompt": f"p {i}", "response": f"r {i}"} for i in range(12)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*arguments, "--behaviours", str(tmp_path / "all.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "nothing is held out" in capsys.readouterr().err
