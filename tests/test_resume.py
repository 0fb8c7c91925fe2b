"""Interrupted, killed and repeated runs: nothing finished is lost, computed twice, or different."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import jaxmed as jm
from jaxmed import results
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.models.model import Model
from jaxmed.runs import legal as run_legal
from jaxmed.runs.folder import read_run
from tests import tiny

SETTINGS = {"outcome": ("prefix-gap", "sequence-logprob"), "unit": tuple(MEDIATORS), "window": 5}


def _same(a: xr.Dataset, b: xr.Dataset) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name].values, b[name].values, equal_nan=a[name].dtype.kind == "f") for name in a)


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 5])
def test_an_interrupted_run_resumes_to_the_same_table(plain_model: Model, tmp_path: Path, after: int) -> None:
    whole = jm.sweep(plain_model, tiny.LONG[:2], **SETTINGS, out=tmp_path / "whole")
    seen = []

    def interrupt(work: float, count: int, what: str) -> None:
        seen.append(what)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jm.sweep(plain_model, tiny.LONG[:2], **SETTINGS, out=tmp_path / "cut", watch=interrupt)
    assert int(results.open_results(tmp_path / "cut").done.sum()) == after
    resumed = jm.sweep(plain_model, tiny.LONG[:2], **SETTINGS, out=tmp_path / "cut", resume=True)
    assert _same(whole, resumed)
    sessions = read_run(tmp_path / "cut")["sessions"]
    assert sessions[1]["layers"] == 2 * plain_model.config.layers - after


def test_finished_layers_are_not_computed_again(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "run")
    monkeypatch.setattr("jaxmed.effects.exact.prepare", lambda *_: pytest.fail("a finished pair was run again"))
    table = jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "run", resume=True)
    assert table.done.values.all()


def test_resume_of_an_absent_folder_runs(plain_model: Model, tmp_path: Path) -> None:
    table = jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "new", resume=True)
    assert table.done.values.all()


def test_a_layout_without_a_run_record_is_begun_anew(plain_model: Model, tmp_path: Path) -> None:
    jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / ".effects.zarr.partial").mkdir()
    assert jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "run").done.values.all()


def test_a_run_is_never_written_over(plain_model: Model, tmp_path: Path) -> None:
    jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(jm.UserError, match="--resume"):
        jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "run")
    with pytest.raises(jm.UserError, match="another request"):
        jm.sweep(plain_model, tiny.PAIRS[:1], outcome="kl", out=tmp_path / "run", resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_foreign_files_stop_a_run(plain_model: Model, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(jm.UserError, match=r"thesis\.tex"):
            jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path, resume=resume)


def test_a_full_disk_keeps_what_was_finished(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = results.Table.write

    def fill(self, chunks):
        written.append(chunks)
        if len(written) == 6:
            raise jm.UserError("No space left on device")
        original(self, chunks)

    monkeypatch.setattr(results.Table, "write", fill)
    with pytest.raises(jm.UserError, match="No space"):
        jm.sweep(plain_model, tiny.PAIRS[:2], out=tmp_path / "run")
    monkeypatch.undo()
    done = int(results.open_results(tmp_path / "run").done.sum())
    assert done >= 1
    assert jm.sweep(plain_model, tiny.PAIRS[:2], out=tmp_path / "run", resume=True).done.values.all()


def test_too_little_space_is_said_before_anything_is_written(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_legal.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10})())
    with pytest.raises(jm.UserError, match="needs up to"):
        jm.sweep(plain_model, tiny.PAIRS[:1], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


_CHILD = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
import jaxmed as jm
from jaxmed.effects.mediators import MEDIATORS
from tests import tiny
jm.sweep(tiny.model("llama"), tiny.LONG, ("prefix-gap", "sequence-logprob"), tuple(MEDIATORS), window=5, out=sys.argv[1], resume=True)
"""


@pytest.mark.slow
def test_sigkill_at_random_times_leaves_a_store_that_resumes(plain_model: Model, tmp_path: Path) -> None:
    whole = jm.sweep(plain_model, tiny.LONG, **SETTINGS)
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    kills, rng = 0, np.random.default_rng(0)
    for _ in range(8):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "run.json").exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            child.wait(timeout=float(rng.uniform(0.0, 6.0)))
            break
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
    assert kills >= 1
    final = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert final.returncode == 0, final.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert _same(whole, results.open_results(tmp_path / "run").load())
