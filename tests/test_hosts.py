"""Several processes that sweep together on one mesh, against one process with as many devices; killed, and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr

import jaxmed as jm
from jaxmed import hosts
from jaxmed.cli.main import main
from jaxmed.hosts.exchange import Joined
from jaxmed.hosts.found import find_cluster, idle_gpus
from jaxmed.results.table import Table
from jaxmed.runs import signals
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


def _start(
    command: list[str], out: Path, count: int, run: Sequence[str] = (sys.executable, "-m", "jaxmed.cli.main"), devices: int = 0
) -> list[subprocess.Popen[str]]:
    """`count` processes that share four devices, or have `devices` each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices or DEVICES // count}{QUICK_COMPILES}"
    run = [*run, *command, "--out", str(out)]
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


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["sweep", "--hosts", "node0:8476,4,0", "--out", "x"], ["sweep", "--hosts", "node0:8476,4,NUMBER", "--out", "x"]),
        (["sweep", "--hosts=[::1]:8476,2,1"], ["sweep", "--hosts=[::1]:8476,2,NUMBER"]),
        (["sweep", "--hosts", "auto"], ["sweep", "--hosts", "auto"]),
        (["sweep", "--pairs", "a:1,2,3"], ["sweep", "--pairs", "a:1,2,3"]),
    ],
)
def test_a_command_for_all_processes_has_the_number_of_none(given: list[str], told: list[str]) -> None:
    assert hosts.for_all(given) == told


@pytest.mark.slow
def test_two_processes_come_to_the_bits_of_one(command: list[str], alone: Path, tmp_path: Path) -> None:
    said = _finish(_start(command, tmp_path / "run", 2))
    assert "largest mean effects" in said[0]
    assert not [line for line in said[1].splitlines() if not line.startswith("[Gloo]")], "the first process prints alone"
    _same(tmp_path / "run", alone)
    assert (tmp_path / "run" / "report.html").is_file()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["manifest"]["mesh"] == {"data": DEVICES, "fsdp": 1, "tensor": 1}
    assert len(record["sessions"]) == 1


def _wait_for_an_item(run: Path, child: subprocess.Popen[str]) -> None:
    markers, deadline = run / "effects.zarr" / "done" / "c", time.monotonic() + 300
    while not markers.exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_in_order(command: list[str], alone: Path, tmp_path: Path) -> None:
    children = _start(command, tmp_path / "run", 2)
    _wait_for_an_item(tmp_path / "run", children[0])
    children[1].send_signal(signal.SIGTERM)
    said = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [143, 143], said
    assert "interrupted by SIGTERM. What was finished is kept" in said[0][1]
    assert "continue with, in every process: jaxmed sweep" in said[0][1]
    assert ",2,NUMBER " in said[0][1]
    assert "interrupted" not in said[1][1]
    done = Table(tmp_path / "run").done()
    assert done.any()
    assert not done.all()
    (session,) = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert (session["status"], session["layers"]) == ("interrupted", done.sum())
    _finish(_start([*command, "--resume"], tmp_path / "run", 2))
    _same(tmp_path / "run", alone)


@pytest.mark.slow
def test_where_a_process_is_killed_all_end_and_the_run_goes_on(command: list[str], alone: Path, tmp_path: Path) -> None:
    children = _start(command, tmp_path / "run", 2)
    _wait_for_an_item(tmp_path / "run", children[0])
    os.kill(children[1].pid, signal.SIGKILL)
    for child in children:
        child.communicate(timeout=300)
    assert children[1].returncode == -signal.SIGKILL
    done = Table(tmp_path / "run").done()
    assert done.any()
    _finish(_start([*command, "--resume"], tmp_path / "run", 2))
    _same(tmp_path / "run", alone)


SHARDS = """
import sys
from jaxmed.cache import job, run
from jaxmed.cli.main import main
job.SHARD_BYTES = 1
computed = run._run_shard
run._run_shard = lambda job, prompts: print("shard", prompts.start, file=sys.stderr) or computed(job, prompts)
sys.exit(main(sys.argv[1:]))
"""
"""A command whose shards hold a prompt each, and which says which it computes."""


@pytest.mark.slow
def test_processes_write_shards_of_their_own(command: list[str], tmp_path: Path) -> None:
    """Against one process with as many devices as each of two has."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": pair.base}) + "\n" for pair in tiny.PAIRS[:3]))
    write = ["cache", "write", "--model", command[2], "--data", str(prompts), "--sites", "residual_out", "neuron"]
    alone = _start(write, tmp_path / "one", 1, [sys.executable, "-c", SHARDS], devices=1)
    _finish(alone)
    both = _start(write, tmp_path / "two", 2, [sys.executable, "-c", SHARDS], devices=1)
    said = [child.communicate(timeout=600)[1] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert [re.findall(r"^shard (\d)$", text, re.M) for text in said] == [["0", "2"], ["1"]]
    ours, theirs = (xr.open_zarr(tmp_path / name, consolidated=False).load() for name in ("two", "one"))
    xr.testing.assert_identical(ours, theirs)
    (session,) = json.loads((tmp_path / "two" / "run.json").read_text())["sessions"]
    assert (session["status"], session["prompts"]) == ("finished", 3)
    assert main(["cache", "verify", str(tmp_path / "two")]) == 0


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


OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
SLICE = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a,b"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
FOUND = [
    ({**OMPI, "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.2:3"}, "Open MPI", "OmpiCluster"),
    (SLURM, "Slurm", "SlurmCluster"),
    (SLICE, "GKE's TPU hosts", "GkeTpuCluster"),
    (POD, "Kubernetes", "K8sCluster"),
]
"""Variables of a cluster, our name of it, and JAX's class."""
NEAR = [
    (OMPI, "OMPI_MCA_orte_hnp_uri missing. Open MPI 5 does not say"),
    ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, "SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_LOCALID missing. Start the command by srun."),
    (SLICE, "the package libtpu missing"),
    (POD, "the package kubernetes missing. Install jax[k8s]"),
    ({}, "Three ways: start by srun"),
]
"""Variables that do not suffice, and part of the message."""


@pytest.fixture
def alone_here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No cluster, and neither libtpu nor kubernetes is installed."""
    for name in os.environ:
        if name.startswith(("OMPI_", "SLURM_", "TPU_", "KUBERNETES_", "JOB_COMPLETION", "MEGASCALE_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("jaxmed.hosts.found.find_spec", lambda name: None)
    return monkeypatch


@pytest.mark.parametrize(("variables", "name", "method"), FOUND, ids=lambda value: value if isinstance(value, str) else "")
def test_a_cluster_is_found_where_jax_finds_it(variables: dict[str, str], name: str, method: str, alone_here: pytest.MonkeyPatch) -> None:
    """JAX's own detection, with its packages in place, is the oracle: of all variables, and without each that it reads."""
    from jax._src.clusters import ClusterEnv

    alone_here.setattr("jaxmed.hosts.found.find_spec", lambda name: name)
    alone_here.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    in_cluster = SimpleNamespace(load_incluster_config=lambda: None)
    client = SimpleNamespace(CoreV1Api=object, BatchV1Api=object, exceptions=SimpleNamespace(ApiException=ValueError))
    alone_here.setitem(sys.modules, "kubernetes", SimpleNamespace(config=in_cluster, client=client))
    (cluster,) = [one for one in ClusterEnv._cluster_types if one.__name__ == method]
    for key, value in variables.items():
        alone_here.setenv(key, value)
    assert cluster.is_env_present()
    assert find_cluster(os.environ) == name
    for key in variables:
        less = {other: value for other, value in variables.items() if other != key}
        with alone_here.context() as fewer:
            fewer.delenv(key)
            assert not find_cluster(less)
            assert not cluster.is_env_present() or _numbers_fail(cluster)


def _numbers_fail(cluster: Any) -> bool:
    """Whether JAX begins with a cluster, and then misses a variable."""
    for ask in (cluster.get_process_id, cluster.get_process_count):
        try:
            ask()
        except (KeyError, RuntimeError, ValueError, AttributeError):
            return True
    return False


@pytest.mark.parametrize(("variables", "told"), NEAR, ids=lambda value: value if isinstance(value, str) else "")
def test_where_nothing_says_who_takes_part_auto_is_refused(
    variables: dict[str, str], told: str, alone_here: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is without a cluster; JAX is asked in a process of its own below."""

    def initialize(**given: Any) -> None:
        assert "coordinator_address" not in given
        raise ValueError("coordinator_address should be defined.")

    alone_here.setattr("jax.distributed.initialize", initialize)
    for key, value in variables.items():
        alone_here.setenv(key, value)
    assert main(["sweep", "--hosts", "auto", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("jaxmed: --hosts auto: nothing says which processes take part.")
    assert told in message
    assert "scripts/launch has a script for each" in message
    assert not (tmp_path / "run").exists()


def test_slurm_with_fewer_tasks_than_gpus_gets_a_notice() -> None:
    assert "1 of 8 on a node are used" in idle_gpus({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"})
    assert not idle_gpus({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"})
    assert not idle_gpus({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"})


BLOCKED = """
import ctypes
from jaxmed.hosts.watch import limited
from jaxmed.runs import signals
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
with signals.handled(), limited(LIMIT, lambda: None, lambda: "waited in vain"):
    print("waits", flush=True)
    lock(mutex)
"""
"""A process in a library that hears no signal: it waits for what it holds itself."""


@pytest.mark.parametrize(("limit", "number", "code", "told"), [(0.3, 0, 2, "waited in vain"), (60, 15, 143, "interrupted by SIGTERM.")])
def test_waiting_has_a_limit_and_obeys_signals(limit: float, number: int, code: int, told: str) -> None:
    run = [sys.executable, "-c", BLOCKED.replace("LIMIT", str(limit))]
    child = subprocess.Popen(run, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "waits\n"
    if number:
        child.send_signal(number)
    assert (child.communicate(timeout=60)[1], child.returncode) == (f"jaxmed: {told}\n", code)


JOIN = """
import sys
from jaxmed.cli.main import main
sys.exit(main(["sweep", "--hosts", sys.argv[1], "--hosts-wait", "12", "--out", "none"]))
"""


@pytest.mark.slow
def test_processes_that_wait_in_vain_say_how_many_came(tmp_path: Path) -> None:
    """Of four, numbers 0 and 2 come; and the first process of another run never does."""
    with socket.socket() as free, socket.socket() as other:
        free.bind(("localhost", 0))
        other.bind(("localhost", 0))
        first, second = (f"localhost:{one.getsockname()[1]}" for one in (free, other))
    run = [sys.executable, "-c", JOIN]
    env = {**environment(), "JAX_PLATFORMS": "cpu"}
    each = [f"{first},4,0", f"{first},4,2", f"{second},2,1"]
    children = [subprocess.Popen([*run, one], env=env, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for one in each]
    said = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [2, 2, 2], said
    assert f"2 of 4 processes came to {first} within 12 s" in said[0]
    assert "not all of 4 processes came within 12 s. Process 0 " in said[1]
    assert f"Process 0 does not answer at {second}" in said[2]
    assert [text.count("\n") for text in said] == [1, 1, 1]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("hosts", ["node", "node:1", "node:1,2", "node:1,2,2", "node:1,a,0", "node,2,0"])
def test_hosts_that_make_no_sense_are_refused_first(hosts: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sweep", "--hosts", hosts, "--out", str(tmp_path / "run")]) == 2
    assert "give auto, or HOST:PORT,COUNT,NUMBER" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class _Service:
    """Keys and values in memory, in place of the service that holds processes together."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.kept
        self.kept[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.kept.items() if name.startswith(f"{key}/")]

    def key_value_delete(self, key: str) -> None:
        del self.kept[key]

    def blocking_key_value_get(self, key: str, limit: int) -> str:
        assert limit > 0
        return self.kept[key]


@pytest.mark.parametrize("sent", [(15, 0, 0), (0, 0, 2), (0, 2, 15), (0, 0, 0)])
def test_all_processes_hear_of_a_signal_after_the_same_item(sent: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process other than the first may tell it when it has decided of this item already: then all hear of it after the next."""
    service, turn = _Service(), [0]
    monkeypatch.setattr("jaxmed.hosts.exchange.KEPT_ITEMS", 1)
    monkeypatch.setattr("jaxmed.hosts.state.client", lambda: service)
    monkeypatch.setattr("jaxmed.hosts.exchange.leads", lambda: turn[0] == 0)
    heard = []
    for item in range(3):
        heard.append([])
        for turn[0], number in enumerate(sent):
            monkeypatch.setattr(Joined, "items", item)
            heard[-1].append(hosts.told_to_end(number if item else 0))
    assert all(len(set(one)) == 1 for one in heard)
    assert [one[0] for one in heard] == [0, sent[0], max(sent)]
    assert len([key for key in service.kept if key.startswith("jaxmed/item")]) == 1


def test_a_signal_that_others_heard_of_is_no_second_one() -> None:
    with signals.handled():
        with pytest.raises(signals.Interrupted) as caught:
            signals.end_together(signal.SIGTERM)
        assert (caught.value.together, signals.exit_code(caught.value)) == (True, 143)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one would end this process at once
        assert signals.asked() == signal.SIGTERM


@pytest.mark.parametrize(("items", "parts"), [(5, [[0, 3], [1, 4], [2, None]]), (0, [[], [], []]), (3, [[0], [1], [2]])])
def test_parts_are_of_one_length(items: int, parts: list[list[int | None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Joined, "many", True)
    monkeypatch.setattr("jax.process_count", lambda: 3)
    for number, part in enumerate(parts):
        monkeypatch.setattr("jax.process_index", lambda number=number: number)
        assert hosts.own_part(range(items)) == part


def test_a_process_alone_decides_alone() -> None:
    def refuse() -> float:
        raise jm.UserError("no")

    assert hosts.leads()
    assert not hosts.several()
    assert hosts.agree(2.5) == hosts.first_tells(lambda: 2.5) == 2.5
    with pytest.raises(jm.UserError, match="no"):
        hosts.first_tells(refuse)
