"""Several processes that sweep together on one mesh, against one process with as many devices; killed, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed import hosts
from jaxmed.cli.main import main
from jaxmed.results.table import Table
from tests import tiny
from tests.conftest import QUICK_COMPILES
from tests.processes import environment

DEVICES = 4


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A sweep of a tiny model, but for --out and --hosts."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.write_checkpoint(folder / "m")
    tiny.tokenizer().save_pretrained(model)
    rows: list[dict[str, Any]] = [
        {"id": pair.id, "base": pair.base, "source": pair.source, "target": list(pair.target), "foil": list(pair.foil)}
        for pair in tiny.PAIRS
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "sweep",
        "--model",
        str(model),
        "--pairs",
        str(folder / "p.jsonl"),
        "--unit",
        "neuron",
        "head_out",
        "mlp_out",
        "--method",
        "exact",
    ]


def _start(command: list[str], out: Path, count: int) -> list[subprocess.Popen[str]]:
    """`count` processes that share four devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}{QUICK_COMPILES}"
    run = [sys.executable, "-m", "jaxmed.cli.main", *command, "--out", str(out)]
    hosts = [["--hosts", f"localhost:{port},{count},{number}"] if count > 1 else [] for number in range(count)]
    shown: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*run, *one], env={**environment(), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, **shown) for one in hosts]


def _finish(children: list[subprocess.Popen[str]]) -> list[str]:
    """What every process prints, when all have come to their end."""
    said = [child.communicate(timeout=600) for child in children]
    assert [child.returncode for child in children] == [0] * len(children), said
    return [out for out, _ in said]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    _finish(_start(command, out, 1))
    return out


def _same(one: Path, other: Path) -> None:
    ours, theirs = (jm.open_results(folder).load() for folder in (one, other))
    for name in ("neuron", "head_out", "mlp_out", "base_outcome", "source_outcome", "neuron_mean"):
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    assert (one / "top.csv").read_text() == (other / "top.csv").read_text()


@pytest.mark.slow
def test_two_processes_come_to_the_bits_of_one(command: list[str], alone: Path, tmp_path: Path) -> None:
    said = _finish(_start(command, tmp_path / "run", 2))
    assert "largest mean effects" in said[0]
    assert not [line for line in said[1].splitlines() if not line.startswith("[Gloo]")], "the first process prints alone"
    _same(tmp_path / "run", alone)
    assert (tmp_path / "run" / "report.html").is_file()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["manifest"]["mesh"] == {"data": DEVICES, "model": 1}
    assert len(record["sessions"]) == 1


@pytest.mark.slow
def test_where_a_process_is_killed_all_end_and_the_run_goes_on(command: list[str], alone: Path, tmp_path: Path) -> None:
    children = _start(command, tmp_path / "run", 2)
    markers, deadline = tmp_path / "run" / "effects.zarr" / "done" / "c", time.monotonic() + 300
    while not markers.exists() and time.monotonic() < deadline and children[0].poll() is None:
        time.sleep(0.01)
    os.kill(children[1].pid, signal.SIGKILL)
    for child in children:
        child.communicate(timeout=300)
    assert children[1].returncode == -signal.SIGKILL
    done = Table(tmp_path / "run").done()
    assert done.any()
    _finish(_start([*command, "--resume"], tmp_path / "run", 2))
    _same(tmp_path / "run", alone)


def _launch(command: list[str], out: Path, folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    """Two processes by the launch script for SSH, over an ssh that runs commands here; `first` is what sh does before jaxmed begins."""
    for name, text in (
        ("ssh", 'shift 5; exec sh -c "$*"'),
        ("jaxmed", f'for last; do :; done; {first}exec {sys.executable} -m jaxmed.cli.main "$@"'),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    flags = f"--xla_force_host_platform_device_count={DEVICES // 2}{QUICK_COMPILES}"
    env = {**environment(), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PATH": f"{folder}:{os.environ['PATH']}"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "scripts" / "launch" / "ssh.py"
    words = [sys.executable, str(script), "--hosts", "localhost,localhost", "--port", str(port), "--grace", "5"]
    return subprocess.run([*words, "--", "jaxmed", *command, "--out", str(out)], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_launch_script_for_ssh_runs_a_sweep(command: list[str], alone: Path, tmp_path: Path) -> None:
    done = _launch(command, tmp_path / "run", tmp_path, "")
    assert done.returncode == 0, done.stderr
    _same(tmp_path / "run", alone)


@pytest.mark.slow
def test_where_a_process_does_not_start_the_launch_script_ends_the_others(command: list[str], tmp_path: Path) -> None:
    done = _launch(command, tmp_path / "run", tmp_path, 'case "$last" in *,1) exit 6;; esac; ')
    assert done.returncode == 6
    assert "process 1 on localhost: failed with exit code 6" in done.stderr
    assert "sends SIGTERM to process 0" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("hosts", ["node", "node:1", "node:1,2", "node:1,2,2", "node:1,a,0", "node,2,0"])
def test_hosts_that_make_no_sense_are_refused_first(hosts: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sweep", "--hosts", hosts, "--out", str(tmp_path / "run")]) == 2
    assert "give auto, or HOST:PORT,COUNT,NUMBER" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_process_alone_decides_alone() -> None:
    def refuse() -> float:
        raise jm.UserError("no")

    assert hosts.leads()
    assert not hosts.several()
    assert hosts.agree(2.5) == hosts.first_tells(lambda: 2.5) == 2.5
    with pytest.raises(jm.UserError, match="no"):
        hosts.first_tells(refuse)
