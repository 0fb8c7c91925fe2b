"""How far runs are, as their folders say, and progress that programs read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jaxmed as jm
from jaxmed.cache import job
from jaxmed.cli.main import main
from jaxmed.models.model import Model
from jaxmed.runs import watch
from jaxmed.runs.lock import LOCK, hold
from jaxmed.runs.status import find_runs, prometheus
from tests import tiny


class StoppedError(Exception):
    pass


@pytest.fixture
def runs(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished sweep of two layers, one that stopped after its first pair, and activations of which a shard is missing."""
    folder = tmp_path / "runs"
    jm.sweep(plain_model, tiny.PAIRS, layers=(0, 2), out=folder / "whole")

    def stop(*_: Any) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        jm.sweep(plain_model, tiny.PAIRS, layers=(1,), out=folder / "deep" / "half", watch=_after(2, stop))
    monkeypatch.setattr(job, "prompts_of_a_shard", lambda each, count: 2)
    from jaxmed.cache import run

    forward = run.forward
    monkeypatch.setattr(run, "forward", _after(2, stop, forward))
    with pytest.raises(StoppedError):
        jm.activations(plain_model, ["harm one", "harm two", "harm three"], out=folder / "cache")
    return folder


def _after(calls: int, stop: Any, usual: Any = lambda *_, **__: None) -> Any:
    """What works as usual, and stops at a call of some number."""
    made: list[int] = []

    def called(*given: Any, **more: Any) -> Any:
        made.append(1)
        if len(made) >= calls:
            stop()
        return usual(*given, **more)

    return called


def test_every_run_says_what_is_done_and_what_is_missing(runs: Path) -> None:
    found = {str(one.folder.relative_to(runs)): one for one in find_runs(runs)}
    assert list(found) == ["cache", "deep/half", "whole"]
    whole, half, cache = found["whole"], found["deep/half"], found["cache"]
    assert (whole.kind, whole.status, whole.done, whole.total, whole.missing) == (
        "sweep",
        "finished",
        2 * len(tiny.PAIRS),
        2 * len(tiny.PAIRS),
        (),
    )
    assert half.status == "failed"
    assert half.total == len(tiny.PAIRS)
    assert half.done is not None
    assert 0 < half.done < len(tiny.PAIRS)
    assert half.missing == tuple(pair.id for pair in tiny.PAIRS[half.done :])
    assert (cache.kind, cache.status, cache.done, cache.total, cache.missing) == ("activations", "failed", 2, 3, ("2",))
    assert whole.counts["layers"] == whole.total
    assert whole.seconds > 0


def test_a_run_whose_process_is_gone_was_killed(runs: Path) -> None:
    record = json.loads((runs / "whole" / "run.json").read_text())
    record["status"] = record["sessions"][-1]["status"] = "running"
    (runs / "whole" / "run.json").write_text(json.dumps(record))
    assert find_runs(runs / "whole")[0].status == "killed"
    with hold(runs / "whole"):
        assert find_runs(runs / "whole")[0].status == "running"
        with pytest.raises(jm.UserError, match="in use"), hold(runs / "whole"):
            pass
    (runs / "whole" / LOCK).touch()  # what a killed process leaves
    assert find_runs(runs / "whole")[0].status == "killed"


def test_the_command_tells_people_and_programs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(runs), "--prometheus", str(runs / "jaxmed.prom")]) == 0
    said = capsys.readouterr().out
    assert "2 of 3" in said
    assert "missing: 2" in said
    text = (runs / "jaxmed.prom").read_text()
    assert text == prometheus(find_runs(runs))
    assert f'jaxmed_items{{run="{runs / "cache"}",kind="activations"}} 3' in text.splitlines()
    assert main(["status", str(runs), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["kind"], row["done"], row["total"]) for row in rows if row["kind"] == "activations"] == [("activations", 2, 3)]
    assert len(rows) == 3


DAMAGED: list[Any] = [
    [],
    {"manifest": []},
    {"manifest": {}, "sessions": 3},
    {"manifest": {}, "sessions": ["x"]},
    {"manifest": {}, "sessions": [{"seconds": "long"}]},
]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_the_characters_gets_their_numbers(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "日é").mkdir()
    (tmp_path / "日é" / "run.json").write_text('{"manifest": {}, "status": "finished"}')
    shown = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["status", str(tmp_path)]) == 0
    shown.seek(0)
    assert {"ascii": "\\u65e5\\xe9", "latin-1": "\\u65e5é", "utf-8": "日é"}[encoding] in shown.read()


@pytest.mark.filterwarnings("default::jaxmed.errors.Notice")
@pytest.mark.parametrize("held", DAMAGED)
def test_a_record_that_cannot_be_read_hides_no_other(held: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, record in (("bad", held), ("good", {"manifest": {"pairs": 7, "layers": "all"}, "status": "finished", "sessions": [2.5]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    assert main(["status", str(tmp_path / "bad")]) == 2
    assert "is no record of a run" in capsys.readouterr().err
    assert main(["status", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["seconds"] for line in said.out.splitlines()] == [2.5]
    assert f"{tmp_path / 'bad' / 'run.json'} is no record of a run" in said.err


@pytest.mark.parametrize("name", ["folder", "text/x", "n" * 300])
def test_a_file_that_cannot_be_written_is_refused_first(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").touch()
    assert main(["status", str(tmp_path), "--prometheus", str(tmp_path / name)]) == 2
    assert "jaxmed: --prometheus" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("none", "There is no folder"), ("", "holds no run")])
def test_folders_without_runs_are_refused(name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_progress_in_json_has_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(watch, "FIRST_LINE", 0.0)
    monkeypatch.setattr(watch, "LINES", (0.0, 0.0))
    watch.log_json(True)
    try:
        with watch.progress("sweep", 10.0) as report:
            report(4.0, 2, "pair-1")
            report(6.0, 3, "pair-2")
    finally:
        watch.log_json(False)
    rows = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(row["item"], row["share"], row["count"]) for row in rows] == [("pair-1", 0.4, 2), ("pair-2", 1.0, 5), ("", 1.0, 5)]
    assert rows[-1]["seconds_left"] == 0


def test_a_commands_record_says_how_it_was_called(tmp_path: Path) -> None:
    model = tiny.write_checkpoint(tmp_path / "m")
    tiny.tokenizer().save_pretrained(model)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "harm"}) + "\n")
    given = ["cache", "write", "--model", str(model), "--data", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "a b")]
    environment = {**os.environ, "PYTHONPATH": str(Path(jm.__file__).parents[1])}
    subprocess.run([sys.executable, "-m", "jaxmed.cli.main", *given], check=True, env=environment, capture_output=True)
    assert find_runs(tmp_path / "a b")[0].command.endswith(f"--out '{tmp_path / 'a b'}'")
