"""Launch scripts: what they would run, that they run just that, what they refuse, and processes over a stand-in for ssh."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxmed.cli.main import COMMANDS
from tests.processes import environment

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"
SWEEP = "-- jaxmed sweep --unit neuron --out /runs/big"
TPU = "tpu --name my-slice --zone us-east5-a"
SLURM = "slurm --nodes 2"
GKE = "gke --name big --image repo/jaxmed:1 --claim runs"
SLICE = f"{GKE} --tpu tpu-v5-lite-podslice --topology 4x4 --chips 4"
SSH = "ssh --hosts node0,me@node1"
DRY = {
    f"{TPU} --workdir /my/runs --env A=b --project mine {SWEEP}": [
        "gcloud compute tpus tpu-vm ssh my-slice --zone=us-east5-a --worker=all --project=mine '--command=cd /my/runs && "
        "echo $$ >/tmp/jaxmed-$USER.pid && exec env A=b jaxmed sweep --unit neuron --out /runs/big --hosts auto'"
    ],
    f"{TPU} --signal TERM": [
        "gcloud compute tpus tpu-vm ssh my-slice --zone=us-east5-a --worker=all '--command=pid=$(cat /tmp/jaxmed-$USER.pid) && "
        'grep -q jaxmed /proc/$pid/cmdline && kill -s TERM "$pid"\''
    ],
    f"{SLURM} --gpus 8 --time 12:00:00 --partition gpu --workdir '/my runs' {SWEEP}": [
        "sbatch <<'END'",
        "#!/bin/bash",
        "#SBATCH --job-name=jaxmed",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=12:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --output=jaxmed-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@300",
        "cd '/my runs' || exit 2",
        "exec srun --kill-on-bad-exit=1 jaxmed sweep --unit neuron --out /runs/big --resume --hosts auto",
        "END",
    ],
}
"""Flags -> the lines that a dry run prints."""
REMOTE = (
    "exec 3<&0; ( while read -r name <&3; do kill -s $name $$; done; kill -s TERM $$ ) >/dev/null 2>&1 & "
    'exec 3<&-; cd "$1" && shift && exec "$@" </dev/null'
)
REFUSED = {
    SSH: "give the jaxmed command after `--`",
    f"{SSH} -- ls": "give the jaxmed command after `--`",
    f"{SSH} -- jaxmed models": "jaxmed models runs as one process. Those of several: sweep, trace, cache write",
    f"{SSH} -- jaxmed sweep --hosts=auto": "leave out --hosts",
    f"{SSH} -- jaxmed sweep --prefill 'a\nb'": "line break",
    f"{SSH} --env A {SWEEP}": "--env 'A': give NAME=VALUE",
    f"{SSH} --prot 1 {SWEEP}": "unrecognized arguments: --prot 1",
    f"{SSH} --port 0 {SWEEP}": "--port 0",
    f"ssh --hosts=a,-oProxyCommand=x {SWEEP}": "--hosts '-oProxyCommand=x'",
    f"ssh {SWEEP}": "the following arguments are required: --hosts",
    f"{TPU}; --signal TERM": "--zone 'us-east5-a;'",
    f"{TPU} --signal TERM {SWEEP}": "--signal is for the command that runs",
    f"slurm --nodes 0 {SWEEP}": "--nodes '0'",
    f"{SLURM} --time soon {SWEEP}": "--time 'soon'",
    f"{SLURM} --partition 'a b' {SWEEP}": "--partition 'a b'",
    f"{GKE} {SWEEP}": "give --tpu with --topology and --chips, or --gpu with --gpus and --hosts",
    f"{GKE} --tpu t --topology 4 {SWEEP}": "--topology '4'",
    f"{SLICE} --hosts 3 {SWEEP}": "--topology 4x4 has 16 chips: with --chips 4 these are 4 hosts",
    f"{GKE} --gpu l4 {SWEEP}": "--hosts '0': give how many hosts",
    f"{SLICE} -- jaxmed sweep --out big/../../x": "is not in the shared folder /runs",
    f"{SLICE} -- jaxmed sweep --out=/tmp/x": "--out '/tmp/x' is not in the shared folder /runs",
    f"gke --name Big --image i --claim runs {SWEEP}": "--name 'Big'",
}
"""Flags -> part of the one message."""


def _start(line: str, folder: Path | None = None, **how: Any) -> subprocess.Popen[str]:
    """A launch script with its flags; programs of `folder` come before those of the machine."""
    name, *words = shlex.split(line)
    env = environment() if folder is None else {**environment(), "PATH": f"{folder}:{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(LAUNCH / f"{name}.py"), *words], text=True, env=env, **pipes, **how)


def _said(line: str, folder: Path | None = None) -> tuple[int, str, str]:
    """Exit code, output and messages."""
    child = _start(line, folder)
    out, messages = child.communicate(timeout=120)
    return child.returncode, out, messages


def _dry(line: str) -> str:
    flags, end, command = line.partition(" -- ")
    code, out, messages = _said(f"{flags} --dry-run{end}{command}")
    assert (code, messages) == (0, "")
    return out


def _program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("line", DRY)
def test_a_dry_run_prints_the_lines(line: str) -> None:
    assert _dry(line).splitlines() == DRY[line]


def test_a_dry_run_over_ssh_prints_a_line_per_process() -> None:
    for number, line in enumerate(_dry(f"{SSH} --port 99 --address 10.0.0.1 --workdir /w --env 'A=b c' {SWEEP}").splitlines()):
        *ssh, host, remote = shlex.split(line)
        assert ssh == ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15"]
        assert host == ("node0", "me@node1")[number]
        run = ["env", "A=b c", "jaxmed", "sweep", "--unit", "neuron", "--out", "/runs/big", "--hosts", f"10.0.0.1:99,2,{number}"]
        assert shlex.split(remote) == ["sh", "-c", REMOTE, "sh", "/w", *run]
        subprocess.run(["bash", "-n"], input=remote, text=True, check=True)


@pytest.mark.parametrize("line", [*DRY, f"{SLICE} {SWEEP}"])
def test_what_is_run_is_what_a_dry_run_prints(line: str, tmp_path: Path) -> None:
    for name in ("gcloud", "sbatch", "kubectl"):
        reads = "" if name == "gcloud" else "cat; "
        _program(tmp_path, name, f'for word in {name} "$@"; do printf "%s\\n" "$word"; done; {reads}exit 3')
    code, ours, _ = _said(line, tmp_path)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shell = subprocess.run(["bash"], input=_dry(line), text=True, capture_output=True, env=env)
    assert (code, ours) == (3, shell.stdout) == (shell.returncode, shell.stdout)
    assert ours


@pytest.mark.parametrize("line", DRY)
def test_shell_text_is_sound(line: str) -> None:
    shown = "\n".join(DRY[line])
    inner = shown.partition("\n")[2].rpartition("\n")[0] if line.startswith("slurm") else shlex.split(shown)[-1].partition("=")[2]
    for one in (shown, inner):
        subprocess.run(["bash", "-n"], input=one, text=True, check=True)


def _manifest(line: str) -> dict[str, Any]:
    first, *text, last = _dry(line).splitlines()
    assert (first, last) == ("kubectl create -f - <<'END'", "END")
    return yaml.safe_load("\n".join(text))


def test_a_jobset_on_a_slice_has_a_pod_per_host() -> None:
    found = _manifest(f"{SLICE} --env 'A=$(B) \"c\"' --restarts 3 {SWEEP}")
    assert (found["apiVersion"], found["kind"], found["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "big")
    assert found["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 3
    (hosts,) = found["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert (hosts["replicas"], job["completionMode"], job["completions"], job["parallelism"]) == (1, "Indexed", 4, 4)
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert set(pod["nodeSelector"].values()) == {"tpu-v5-lite-podslice", "4x4"}
    (container,) = pod["containers"]
    assert container["command"] == [*shlex.split(SWEEP)[1:], "--resume", "--hosts", "auto"]
    assert container["env"] == [{"name": "A", "value": '$$(B) "c"'}]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"][0]["mountPath"] == "/runs" == container["workingDir"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "runs"


def test_a_jobset_on_gpus_names_its_first_pod_to_all() -> None:
    found = _manifest(f"{GKE} --gpu nvidia-h100-80gb --gpus 8 --hosts 2 -- jaxmed trace --out=big --prefill '$x'")
    assert "annotations" not in found["metadata"]
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    run = ["jaxmed", "trace", "--out=big", "--prefill", "$$x", "--resume"]
    assert container["command"] == [*run, "--hosts", "big-hosts-0-0.big:8476,2,$(JOB_COMPLETION_INDEX)"]
    assert (job["completions"], container["resources"]["limits"]) == (2, {"nvidia.com/gpu": 8})


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_gets_one_message(line: str, tmp_path: Path) -> None:
    code, out, messages = _said(line, tmp_path)
    assert (code, out) == (2, "")
    name, _, message = messages.partition(": ")
    assert name == f"{line.split()[0]}.py"
    assert REFUSED[line] in message
    assert messages.count("\n") == 1


def test_the_guide_shows_what_dry_runs_print() -> None:
    guide = (LAUNCH.parents[1] / "docs" / "guides" / "scale.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```console\n\$ python scripts/launch/(\w+)\.py ([^\n]*)\n(.*?)^```", guide, re.M | re.S)
    assert {name for name, *_ in shown} == {path.stem for path in LAUNCH.glob("*.py")} - {"arguments"}
    for name, line, printed in shown:
        assert _said(f"{name} {line}")[1] == printed


def test_scripts_know_the_commands_of_several_processes() -> None:
    known = [name for name, command in COMMANDS.items() if "hosts" in {field.name for field in fields(command)}]
    assert f"Those of several: {', '.join(known)}." in _said(f"{SSH} -- jaxmed models")[2]


UP = "until [ -e $up ]; do sleep 0.05; done"
"""Waits until another process is ready for signals."""


@pytest.fixture
def over_ssh(tmp_path: Path) -> Path:
    """A folder of programs: an ssh that runs commands here, and a jaxmed that does what its flag --act says for its number."""
    _program(
        tmp_path,
        "ssh",
        f'shift 4; host=$1; shift; if [ "$host" = broken ]; then {UP}; exit 255; fi; exec sh -c "$*"'.replace("$up", str(tmp_path / "up")),
    )
    act = 'while [ "$1" != --act ]; do shift; done; eval "$2"'
    _program(tmp_path, "jaxmed", f"up={tmp_path}/up; for last; do :; done; number=${{last##*,}}; {act}")
    return tmp_path


def _act(text: str) -> str:
    return f"-- jaxmed sweep --act {shlex.quote(text)}"


def test_over_ssh_all_end_well(over_ssh: Path) -> None:
    code, out, messages = _said(f"ssh --hosts a,me@b --workdir {over_ssh} {_act('echo $PWD $last')}", over_ssh)
    assert (code, messages) == (0, "")
    assert sorted(out.splitlines()) == [f"{over_ssh} a:8476,2,{number}" for number in range(2)]


TRAPS = "trap 'echo $number got TERM; exit 143' TERM; trap 'echo $number got INT; exit 130' INT"
WAITS = f"{TRAPS}; touch $up; echo up; while :; do sleep 0.05; done"


def test_where_one_fails_the_others_are_asked_to_end(over_ssh: Path) -> None:
    code, out, messages = _said(f"ssh --hosts a,b {_act(f'[ $number = 1 ] && {UP} && exit 7; {WAITS}')}", over_ssh)
    assert code == 7
    assert out.splitlines()[-1] == "0 got TERM"
    assert "process 1 on b: failed with exit code 7" in messages
    assert "sends SIGTERM to process 0" in messages
    assert "process 0 on a: ended in order" in messages


def test_where_a_connection_fails_the_others_are_asked_to_end(over_ssh: Path) -> None:
    code, out, messages = _said(f"ssh --hosts a,broken {_act(WAITS)}", over_ssh)
    assert (code, out.splitlines()[-1]) == (255, "0 got TERM")
    assert "process 1 on broken: the connection failed" in messages


def test_who_does_not_end_is_told_again_and_then_ended(over_ssh: Path) -> None:
    deaf = "trap 'n=x$n; echo $n' TERM; touch $up; echo up; while :; do sleep 0.05; done"
    code, out, _ = _said(f"ssh --grace 0.5 --hosts a,b {_act(f'[ $number = 1 ] && {UP} && exit 7; {deaf}')}", over_ssh)
    assert (code, out.split()) == (7, ["up", "x", "xx"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process(over_ssh: Path, number: signal.Signals) -> None:
    child = _start(f"ssh --hosts a,b,c {_act(WAITS)}", over_ssh)
    assert child.stdout is not None
    assert [child.stdout.readline() for _ in range(3)] == ["up\n"] * 3
    child.send_signal(number)
    out, messages = child.communicate(timeout=60)
    assert sorted(out.splitlines()) == [f"{one} got {number.name[3:]}" for one in range(3)]
    assert (child.returncode, messages.count("ended in order")) == (128 + number, 3)


def test_the_end_of_the_launcher_ends_processes_in_order(over_ssh: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    child = _start(f"ssh --hosts a {_act(WAITS.replace('got TERM', f'got TERM >{told}'))}", over_ssh)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.kill()
    child.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while not told.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
