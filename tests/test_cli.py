"""The command line: help, plans, config files, exit codes, and one clear message for every wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import jaxmed as jm
from jaxmed.cli import show
from jaxmed.cli.main import COMMANDS, GROUPS, main
from jaxmed.cli.parser import parse
from jaxmed.errors import UserError
from jaxmed.models.catalog import CATALOG, HUB_EXAMPLES, VARIANTS
from jaxmed.models.config import parse_layers
from jaxmed.results import open_results
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model folder with a tokenizer."""
    folder = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"id": p.id, "category": p.category, "base": p.base, "source": p.source, "target": p.target, "foil": p.foil} for p in tiny.PAIRS
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "pairs.jsonl"


def _sweep(folder: Path, pairs: Path, out: Path, *more: str) -> list[str]:
    return ["sweep", "--model", str(folder), "--pairs", str(pairs), "--out", str(out), *more]


def _refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    return said


def test_a_model_that_was_loaded_by_a_path_object_can_be_swept(folder: Path, tmp_path: Path) -> None:
    jm.sweep(jm.load(folder), tiny.PAIRS[:1], unit="mlp_out", out=tmp_path / "run")
    assert open_results(tmp_path / "run").attrs


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_names_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    positional = {"prompts", "folder", "folders", "pairs", "masks"}  # of some commands: they have no name in the help
    for one in fields(COMMANDS[command]):
        assert f"--{one.name.replace('_', '-')}" in said or one.name in positional


def test_a_sweep_from_the_command_line(folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(_sweep(folder, pairs, out, "--unit", "neuron", "mlp_out", "--layers", "0,2", "--position", "-2")) == 0
    said = capsys.readouterr().out
    assert "exact effects" in said
    assert "largest mean effects" in said
    assert {path.name for path in out.iterdir()} == {"effects.zarr", "run.json", "top.csv", "report.html"}
    assert main(_sweep(folder, pairs, out, "--unit", "neuron", "mlp_out", "--layers", "0,2", "--position", "-2", "--resume")) == 0


def test_a_sweep_of_other_estimands_and_the_reverse_direction(folder: Path, pairs: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "run", ("--unit", "mlp_out", "--estimand", "indirect", "direct", "--direction", "reverse")
    assert main(_sweep(folder, pairs, out, *more)) == 0
    table = open_results(out)
    assert {"mlp_out", "mlp_out_direct", "mlp_out_direct_mean"} <= set(table)
    assert table.attrs["direction"] == "reverse"
    assert "mlp_out_direct" in (out / "top.csv").read_text()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_sweep(folder, pairs, tmp_path / "run", "--dry-run")) == 0
    assert "restarted passes" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "seconds", "said"), [(300, 2.0, "150 per second"), (5, 100.0, "20.0 s each"), (0, 0.0, "0 per second")])
def test_speeds_are_said_as_people_count(count: int, seconds: float, said: str) -> None:
    assert show.speed(count, seconds) == said


def test_config_files_fill_in_and_flags_win(folder: Path, pairs: Path, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(f"model: {folder}\npairs: {pairs}\nout: {tmp_path / 'a'}\nunit: [mlp_out, attention_out]\ntop: 1\nresume: true\n")
    assert main(["sweep", "--config", str(config), "--out", str(tmp_path / "b"), "--unit", "residual_out"]) == 0
    assert not (tmp_path / "a").exists()
    request = json.loads((tmp_path / "b" / "run.json").read_text())["manifest"]["request"]
    assert request["units"] == ["residual_out"]


def test_an_empty_list_of_a_config_file_is_none_of_the_default(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("command: gate\nwindows: []\nmodel: x\nlimit: []\n")
    assert parse(["gate", "--config", str(tmp_path / "c.yaml")], COMMANDS, GROUPS).windows == ()
    assert parse(["gate", "--model", "x"], COMMANDS, GROUPS).windows == (32,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unti: neuron\n", "Did you mean 'unit'"),
        ("unit: {a: 1}\n", "nested value"),
        ("- 3\n", "no 'key: value' entries"),
        ("unit: [\n", "not valid YAML"),
        ("command: demo\n", "is for the command 'demo'"),
    ],
)
def test_wrong_config_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    message = _refused(capsys, ["sweep", "--config", str(tmp_path / "wrong.yaml")])
    assert said in message
    assert "wrong.yaml" in message


def test_numbers_in_yaml_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    from dataclasses import dataclass

    from jaxmed.cli.config_file import expand

    @dataclass(frozen=True)
    class Command:
        rate: float = 0.0

    (tmp_path / "c.yaml").write_text("rate: 1e-3\n")
    assert expand(["--config", str(tmp_path / "c.yaml")], "go", Command) == ["--rate", "1e-3"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--unit", "neurn"], "Did you mean 'neuron'"),
        (["--outcome", "logodds"], "Did you mean 'log-odds'"),
        (["--position", "1000"], "out of range"),
        (["--position", "all"], "cannot be paired"),
        (["--layers", "3"], "layers 0 to 2"),
        (["--layers", "a-b"], "such as 9,19,20-29"),
        (["--unit", "window", "--window", "25"], "1 to 24"),
        (["--mesh", "data=64"], "needs 64 devices"),
        (["--mesh", "pipe=2"], "Legal axes"),
        (["--dtype", "float16"], "float16"),
        (["--limit", "many"], "many"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_wrong_values_exit_with_2(
    folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert said in _refused(capsys, _sweep(folder, pairs, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_foreign_files_exit_with_2_and_stay(folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds something else" in _refused(capsys, _sweep(folder, pairs, folder))


def test_a_report_of_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "effects.zarr" in _refused(capsys, ["report", str(tmp_path)])


def test_bench_wants_random_weights_confirmed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--random-weights" in _refused(capsys, ["bench", "--shape", "llama-3.1-8b"])


@pytest.mark.slow
def test_the_engine_is_measured_on_the_layers_that_are_named(tmp_path: Path) -> None:
    asked = ["bench", "--no-peers", "--repeats", "1", "--layers", "28-29", "--json", str(tmp_path / "b.json")]
    assert main(asked) == 0
    assert json.loads((tmp_path / "b.json").read_text())["layers"] == [28, 29]


def test_bench_refuses_layers_that_the_model_does_not_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "layers 0 to 2" in _refused(capsys, ["bench", "--model", str(folder), "--layers", "1,3"])
    assert "--repeats 0" in _refused(capsys, ["bench", "--model", str(folder), "--repeats", "0"])


def test_models_says_size_and_licence_of_every_known_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, known in CATALOG.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert f"{known.parameters / 1e6:.0f}M" in line
        assert known.licence in line
    assert {line.split()[0] for line in lines if line[:1].isalpha()} >= {*CATALOG, *VARIANTS, *HUB_EXAMPLES}


def test_layers_as_numbers_and_ranges() -> None:
    assert parse_layers("9,19,20-23") == (9, 19, 20, 21, 22, 23)
    assert parse_layers("") is None
    with pytest.raises(UserError):
        parse_layers("4-")


def test_help_does_not_wait_for_jax() -> None:
    asked = "try: main(['sweep', '--help'])\nexcept SystemExit: pass"
    code = f"import sys; from jaxmed.cli.main import main\n{asked}\nassert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_plans(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = yaml.safe_load(config.read_text()).get("command", "sweep")
    needs_files = config.stem.endswith(("llama31_8b", "qwen25_14b", "olmo3_stages"))  # the published sets are the user's
    assert main([*command.split(), "--config", str(config), "--out", str(tmp_path / "run"), "--dry-run"]) == 2 * needs_files
    said = {"sweep": "exact effects", "finetune": "numbers trained", "prune score": "TFLOP"}
    said |= dict.fromkeys(("study mediation", "study pruning", "study misalignment"), "in all")
    shown = capsys.readouterr()
    assert ("file 'data/" if needs_files else said[command]) in (shown.err if needs_files else shown.out)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_interrupting_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jaxmed.cli.main", "sweep", "--out", str(tmp_path / "run"), "--limit", "2", "--layers", "24-29"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    chunks = tmp_path / "run" / "effects.zarr" / "done" / "c"
    deadline = time.monotonic() + 300
    while not list(chunks.rglob("*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    if child.returncode != 0:  # it may have finished first
        assert child.returncode == 130, said
        assert "--resume" in said
        assert "Traceback" not in said
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
