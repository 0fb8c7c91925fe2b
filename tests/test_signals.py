"""Real processes and signals: whatever ends a command, what was finished is kept, the record says so, and it resumes to the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmed.runs.folder import read_run
from tests import tiny
from tests.processes import environment

pytestmark = pytest.mark.slow

CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner of tests may ignore it
from jaxmed.runs import watch
add = watch.Tally.add
def told(self, work, count, what):
    add(self, work, count, what)
    if what != watch.RESUMED:
        print("ITEM", flush=True)
        time.sleep(float(sys.argv[1]))
watch.Tally.add = told
from jaxmed.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
"""A command that says when an item is done, and dwells on it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, pairs, and two sets of examples, as files."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.write_checkpoint(folder / "model")
    tiny.tokenizer().save_pretrained(model)
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [
            {"id": pair.id, "base": pair.base, "source": pair.source, "target": list(pair.target), "foil": list(pair.foil)}
            for pair in tiny.PAIRS
        ],
        "red": [{"prompt": f"say {number}", "response": f"red {number} ok"} for number in range(16)],
        "blue": [{"prompt": f"say {number}", "response": f"blue {number} ok"} for number in range(16)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    paragraphs = [f"Paragraph {number} says that bread is made of {'rye ' * number}." for number in range(1, 13)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    return {"model": model, "text": folder / "text.txt", **{name: folder / f"{name}.jsonl" for name in rows}}


COMMANDS = {
    "sweep": "sweep --model {model} --pairs {pairs} --unit neuron mlp_out head_out",
    "score": "prune score --model {model} --behaviour {red} --preserve {blue} --layers-per-pass 1 --rows 1 --split",
    "evaluate": "evaluate --model {model} --against {model} --examples {red} --text {text} --tokens 12 --save-text --by kind",
    "finetune": "finetune --model {model} --data {red} --rank 2 --batch 4 --steps 12 --save-every 5",
}
"""Commands whose items are layers, batches, parts and steps."""


def _command(name: str, inputs: dict[str, Path], out: Path) -> list[str]:
    words = COMMANDS[name].format(**inputs).split()
    return [*words, *([""] if words[-1] == "--split" else []), "--out", str(out)]


def _start(command: list[str], pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(pause), *command],
        env={**environment(), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _after_items(child: subprocess.Popen[str], items: int) -> None:
    assert child.stdout is not None
    while items and (line := child.stdout.readline()):
        items -= line.strip().endswith("ITEM")


def _finish(command: list[str]) -> None:
    child = _start(command, 0)
    said = child.communicate()
    assert child.returncode == 0, said[1][-2000:]


def _contents(name: str, out: Path) -> dict[str, Any]:
    """What a command leaves, without what its record says of sessions."""
    if name == "evaluate":
        return {key: value for key, value in _record(out).items() if key not in ("sessions", "status")}
    kept = {"sweep": "effects.zarr/*/c/**/*", "score": "scores/**/c/**/*", "finetune": "adapter/*.safetensors"}[name]
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob(kept)) if path.is_file()}
    return found | ({"losses": (out / "losses.csv").read_text()} if name == "finetune" else {})


def _record(out: Path) -> dict[str, Any]:
    """The record of a run: a file of its own, or in a folder."""
    return read_run(out) if out.is_dir() else json.loads(out.read_text())


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each command leaves when nothing disturbs it."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for name in COMMANDS:
        _finish(_command(name, inputs, folder / name))
        found[name] = _contents(name, folder / name)
        assert found[name]
    return found


@pytest.mark.parametrize(
    ("name", "number", "code"), [("sweep", signal.SIGTERM, 143), ("score", signal.SIGINT, 130), ("finetune", signal.SIGTERM, 143)]
)
def test_a_signal_ends_a_command_in_order(
    name: str, number: signal.Signals, code: int, inputs: dict[str, Path], whole: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    command = _command(name, inputs, tmp_path / "out")
    child = _start(command, 0.2)
    _after_items(child, 4)
    child.send_signal(number)
    _, said = child.communicate(timeout=300)
    assert child.returncode == code, said[-2000:]
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith("--resume")
    record = read_run(tmp_path / "out")
    assert record["status"] == record["sessions"][0]["status"] == "interrupted"
    assert record["sessions"][0]["seconds"] > 0
    assert not (tmp_path / "out" / ".lock").exists()
    if name == "finetune":
        assert len(list((tmp_path / "out").glob("checkpoint-*4"))) == 1  # the four steps are kept
    _finish([*command, "--resume"])
    assert _contents(name, tmp_path / "out") == whole[name]


def test_a_second_signal_ends_a_command_at_once(inputs: dict[str, Path], tmp_path: Path) -> None:
    child = _start(_command("finetune", inputs, tmp_path / "out"), 30)
    _after_items(child, 1)
    begun = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGTERM):
        child.send_signal(number)
        time.sleep(0.3)
    child.communicate(timeout=25)
    assert child.returncode == 143
    assert time.monotonic() - begun < 25  # the item alone lasts thirty seconds


MOMENTS = {"score": (1, 6), "evaluate": (0, 3)}
"""Items after which a command is killed: the least, and one more than the most."""


@pytest.mark.parametrize("name", MOMENTS)  # of sweeps and fine-tuning: test_resume, test_finetuning
def test_kills_at_random_moments_lose_no_finished_item(
    name: str, inputs: dict[str, Path], whole: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    command, rng = [*_command(name, inputs, tmp_path / "out"), "--resume"], np.random.default_rng(len(name))
    for items in rng.integers(*MOMENTS[name], 3):
        child = _start(command, 0.05)
        _after_items(child, int(items))
        time.sleep(float(rng.uniform(0, 0.2 if items else 6)))
        child.kill()
        child.communicate()
    _finish(command)
    assert _contents(name, tmp_path / "out") == whole[name]
    statuses = [session["status"] for session in _record(tmp_path / "out")["sessions"]]
    assert statuses[-1] in ("finished", "trained")
    assert set(statuses[:-1]) <= {"killed", "finished", "trained"}
    assert "killed" in statuses


def test_two_commands_in_one_folder_do_not_disturb_each_other(
    inputs: dict[str, Path], whole: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    command = _command("sweep", inputs, tmp_path / "out")
    first = _start(command, 0.5)
    _after_items(first, 1)
    first.send_signal(signal.SIGSTOP)
    second = _start([*command, "--resume"], 0)
    _, said = second.communicate(timeout=300)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert f"in use by process {first.pid}" in said
    first.communicate(timeout=300)
    assert first.returncode == 0
    assert _contents("sweep", tmp_path / "out") == whole["sweep"]
