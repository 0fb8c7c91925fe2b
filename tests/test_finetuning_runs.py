"""Runs of fine-tuning: interrupted, killed, resumed, refused, stopped early, started by the command, built as variants."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.finetuning.job import make_job
from jaxmed.finetuning.run import finetune, run_job
from jaxmed.finetuning.settings import make_settings
from jaxmed.models.catalog import VARIANTS, Variant
from jaxmed.models.load import load
from jaxmed.models.model import Model
from tests import reference, tiny
from tests.finetuning_sets import EXAMPLES, QUICK


@pytest.mark.parametrize(
    "more", [{"method": "lora"}, *(pytest.param(more, marks=pytest.mark.slow) for more in ({"method": "full"}, {"first_layer": 1}))]
)
def test_an_interrupted_run_resumes_to_the_same_losses(plain_model: Model, tmp_path: Path, more: dict[str, Any]) -> None:
    settings = make_settings(**{**QUICK, "steps": 8, "save_every": 3, "evaluate_every": 2, "patience": 3, **more})
    job = make_job(plain_model, EXAMPLES[:20], EXAMPLES[20:], settings)
    whole = run_job(job, tmp_path / "whole")
    seen = []

    def interrupt(work: float, count: int, what: str) -> None:
        seen.append(what)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "cut", False, interrupt)
    again: list[tuple[float, str]] = []
    resumed = run_job(job, tmp_path / "cut", True, lambda work, count, what: again.append((work, what)))
    assert again[0] == (5, "resumed")  # what was reported done is not done again
    assert len(again) == 1 + len(whole.losses) - 5
    assert repr(whole.losses) == repr(resumed.losses)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.model.params, resumed.model.params))
    assert repr(run_job(job, tmp_path / "cut", True).losses) == repr(whole.losses)  # finished: nothing is trained again


def test_early_stopping_returns_the_best(plain_model: Model) -> None:
    other = [jm.Example("ask", "zzzz 9") for _ in range(4)]
    settings = {**QUICK, "steps": 40, "learning_rate": 5e-2, "evaluate_every": 1, "patience": 3}
    tuned = finetune(plain_model, EXAMPLES, other, **settings)
    held = [row["heldout_loss"] for row in tuned.losses]
    assert "no better" in tuned.stopped
    assert len(held) < 40
    assert tuned.step == int(np.argmin(held)) + 1


KILLED = """
import sys
from pathlib import Path
import jaxmed
from tests import tiny
from tests.finetuning_sets import EXAMPLES
from jaxmed.finetuning.job import make_job
from jaxmed.finetuning.run import finish, run_job
from jaxmed.finetuning.settings import make_settings
job = make_job(tiny.model("llama"), EXAMPLES, EXAMPLES[:4], make_settings(steps=40, batch=4, save_every=1, rank=2, learning_rate=1e-2))
finish(run_job(job, Path(sys.argv[1]), True), Path(sys.argv[1]), ("adapter",))
"""


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_losses(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, timeout=600)
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
        for _ in range(600):
            if list((tmp_path / "killed").glob("checkpoint-*")):
                break
            time.sleep(0.1)
        time.sleep(float(rng.uniform(0, 1.5)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment, timeout=600)
    assert (tmp_path / "whole" / "losses.csv").read_text() == (tmp_path / "killed" / "losses.csv").read_text()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"targets": ("q_prj",)}, "q_proj"),
        ({"rank": 0}, "rank of at least 1"),
        ({"first_layer": 99}, "first_layer is 99"),
        ({"method": "full", "first_layer": 1}, "first_layer is of adapters"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"batch": 2, "accumulate": 3}, "accumulate is 3"),
        ({"max_length": 10**6}, "max_length is 1000000"),
        ({"no_such": 1}, "no_such"),
        ({"max_length": 3}, "the limit is 3"),
        ({"max_response": 4, "whole_share": 1.0}, "whole_share is 1.0"),
        ({"whole_share": 0.5}, "whole_share is of responses that a max_response cuts"),
    ],
)
def test_wrong_settings_are_refused(plain_model: Model, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said.replace("(", r"\(")):
        finetune(plain_model, EXAMPLES, **settings)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no examples"),
        ([{"prompt": "a"}], "line 1: the column 'response' is missing"),
        ([{"prompt": "a", "response": " "}], "line 1: the column 'response'"),
        ([{"prompt": "a", "respnse": "b"}], "respnse"),
        ([{"prompt": "a", "response": "b", "split": "heldout"}], "no rows to train on"),
        ([{"prompt": "a", "response": ["b"]}], "a text is expected"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture, rows: list[dict[str, Any]], said: str) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["finetune", "--data", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_model_or_folder_is_not_continued(plain_model: Model, tmp_path: Path) -> None:
    job = make_job(plain_model, EXAMPLES, (), make_settings(**QUICK))
    run_job(job, tmp_path / "run")
    with pytest.raises(jm.UserError, match="holds a run already"):
        run_job(job, tmp_path / "run")
    with pytest.raises(jm.UserError, match="model"):
        run_job(replace(job, model=tiny.model("four_norms")), tmp_path / "run", True)
    run_job(replace(job, model=replace(plain_model, name="the same weights elsewhere")), tmp_path / "run", True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(jm.UserError, match=r"thesis\.tex"):
        run_job(job, tmp_path / "mine")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(plain_model, EXAMPLES, (), make_settings(**{**QUICK, "save_every": 1}))
    whole, seen = run_job(job, tmp_path / "whole"), []

    def fill(work: float, count: int, what: str) -> None:
        seen.append(1)
        if len(seen) == 2:
            usage = shutil.disk_usage(tmp_path)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))

    with pytest.raises(jm.UserError, match="are free there"):
        run_job(job, tmp_path / "full", False, fill)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "full").glob("checkpoint-*")] == ["checkpoint-0000001"]
    assert repr(run_job(job, tmp_path / "full", True).losses) == repr(whole.losses)


def test_the_command_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = tiny.tokenizer()
    folder = tiny.write_checkpoint(tmp_path / "model")
    tokenizer.save_pretrained(folder)
    file, out = tmp_path / "examples.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in EXAMPLES))
    arguments = ["finetune", "--model", str(folder), "--data", str(file), "--out", str(out), "--epochs", "1", "--rank", "2"]
    assert main(arguments) == 0
    assert {path.name for path in out.iterdir() if "checkpoint" not in path.name} == {
        "run.json", "losses.csv", "losses.html", "adapter", "model"
    }  # fmt: skip
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    ids = reference.tokens(12)
    merged, adapted = jm.load(str(out / "model")), jm.load(str(folder), adapter=out / "adapter")
    assert np.abs(np.asarray(jm.forward(merged, ids)[0] - jm.forward(adapted, ids)[0])).max() < 1e-5
    assert main([*arguments, "--resume"]) == 0
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_an_attacked_model_is_not_trained_into_files(plain_model: Model, tmp_path: Path) -> None:
    attacked = replace(plain_model, history=({"kind": "pruning", "tag": "attack"},))
    with pytest.raises(jm.UserError, match="attack"):
        jm.finetune(attacked, EXAMPLES, steps=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(jm.finetune(attacked, EXAMPLES, steps=1).losses) == 1


class _Tiny(Variant):
    def config_text(self) -> str:
        return self.config

    def digest(self) -> str:
        return "0" * 12


@pytest.mark.slow
def test_a_variant_is_built_on_first_use_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(folder)
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in EXAMPLES))
    config = json.dumps({"command": "finetune", "model": str(folder), "data": str(file), "steps": 3, "learning-rate": 1e-2, "warmup": 0})
    monkeypatch.setitem(VARIANTS, "tiny-variant", _Tiny(str(folder), config, "", "it takes seconds", ""))
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    with pytest.raises(jm.UserError, match="not built yet"):
        load("tiny-variant")
    assert main(["finetune", "--model", "tiny-variant", "--data", str(file), "--dry-run"]) == 0  # a plan builds nothing
    assert not list((tmp_path / "cache").rglob("config.json"))
    variant, base = jm.load("tiny-variant"), jm.load(str(folder))
    assert "it takes seconds" in capsys.readouterr().err
    assert not np.array_equal(variant.params["blocks"]["down"], base.params["blocks"]["down"])
    assert variant.history[0]["kind"] == "fine-tuning"
    monkeypatch.setattr("jaxmed.finetuning.variants.run_job", lambda *_: pytest.fail("it was built again"))
    assert jm.load("tiny-variant").identity == variant.identity
