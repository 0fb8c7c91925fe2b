"""What the command line says when something is wrong, and how its tables look: one message, exit code 2, no weights loaded."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jaxmed
from jaxmed.cli import show
from jaxmed.cli.flags import SourceFlags
from jaxmed.cli.main import main
from jaxmed.cli.models import Models
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here is refused before weights are loaded."""
    monkeypatch.setattr(SourceFlags, "load", lambda self: pytest.fail("weights were loaded"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("messages") / "model")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("jaxmed: ")
    return said


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("swep", "`jaxmed sweep`"),
        ("sweeep --limit 1", "`jaxmed sweep`"),
        ("score", "`jaxmed probe score` or `jaxmed prune score`"),
        ("scor", "`jaxmed prune score`"),
        ("pruning", "`jaxmed study pruning`"),
        ("prune scroe", "`jaxmed prune score`"),
        ("prune sweep", "`jaxmed sweep`"),
        ("study prunning", "`jaxmed study pruning`"),
        ("finetunee", "`jaxmed finetune`"),
    ],
)
def test_wrong_commands_are_answered_with_commands_that_exist(arguments: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Did you mean {meant}" in _refused(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("sweep --modle x", "`jaxmed sweep` has no flag --modle. Did you mean --model"),
        ("sweep --raw", "Did you mean --form text"),
        ("generate --qs 3", "--qs is a flag of `jaxmed prune curve`, `jaxmed study pruning`"),
        ("sweep --limit many", "--limit: 'many' is not a whole number"),
        ("sweep --limit 2.5", "--limit: '2.5' is not a whole number"),
        ("finetune --learning-rate fast", "--learning-rate: 'fast' is not a number, such as 0.001"),
        ("sweep --dtype float16", "--dtype: 'float16' is not one of 'float32', 'bfloat16'"),
        ("sweep --top", "--top needs a value"),
        ("sweep --unit --dry-run", "--unit needs a value"),
        ("prune curve --qs", "--qs needs a value"),
        ("sweep --layers 5-1", "the range '5-1' ends before it begins. Write 1-5"),
        ("sweep harm", "there is no place for harm"),
        ("sweep --layers a-b", "--layers: 'a-b': 'a-b' is no layer"),
        ("convert --to orbax", "`jaxmed convert` needs --out"),
        ("convert", "needs --out and --to"),
        ("trace --layers ²", "'²' is no layer"),
        ("circuit --source-adapter x", "`jaxmed circuit` has no flag --source-adapter"),
        ("prune select --q lots", "--q: 'lots' is not a number"),
    ],
)
def test_flags_are_refused_in_words(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *arguments.split())
    assert said in message
    assert "--help`" in message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--verison", "Did you mean --version?"),
        ("-x sweep", "There is no command before '-x'"),
        ("sweep --top -3", "--top -3 is negative"),
        ("sweep --top 0", "--top 0 leaves nothing"),
        ("trace --patch-factor nan", "--patch-factor nan is no finite number"),
        ("finetune --data rude --seed -1", "--seed -1 is negative"),
        ("generate hi --temperature inf", "--temperature inf is no finite number"),
        ("study pruning --seeds -1", "--seeds -1 is negative"),
        ("evaluate --tokens -1", "--tokens -1 is negative"),
        ("sweep --limit 0", "--limit 0 leaves no rows"),
        ("sweep --limit -1", "--limit -1 leaves no rows"),
        ("check --limit 0", "--limit 0 leaves no rows"),
        ("demo --profile-pairs 0", "--profile-pairs 0 leaves no pairs"),
        ("demo --pairs -2", "--pairs -2 leaves no pairs"),
        ("generate hi --tokens 0", "--tokens 0 leaves nothing"),
        ("generate hi --top-p 2", "--top-p (2)"),
        ("evaluate --against M --text=", "--against is compared by its perplexity"),
        ("evaluate --limit 0", "A limit of 0 examples"),
        ("sweep --model M --position --5", "Unknown position '--5'"),
        ("sweep --model M --layers 1,7", "layer 7; this model has layers 0 to 2"),
        ("sweep --model M --mesh data=64", "needs 64 devices"),
        ("sweep --model M --outcome logodds", "Did you mean 'log-odds'"),
        ("sweep --model nothing", "Unknown model 'nothing'"),
        ("prune score --model M --behaviour nothing.csv", "nothing.csv"),
        ("prune score --model M --int8", "int8"),
        ("prune apply --model M --mask nothing --out OUT2", "nothing"),
        ("finetune --model M --rank 3 --first-layer 9", "first_layer"),
        ("models --build aligned", "Did you mean 'smollm2-135m-aligned'"),
        ("parity --model M --tokens -1", "--tokens -1 is negative"),
        ("gate --draws 1e12", "--draws 1e+12 is more than any run takes"),
        ("generate hi --model M --tokens 1e9", "whose keys and values take"),
        ("generate hi --model LONG", "File name too long"),
        ("generate hi --model M --edits LONG", "File name too long"),
        ("bench --append .", "--append . is a folder"),
        ("bench generate --model M --rows 0", "are at least 1"),
        ("bench --json .", "--json . is a folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights_are_loaded(
    arguments: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"M": str(folder), "OUT2": str(tmp_path / "out2"), "LONG": "n" * 300}
    given = [names.get(word, word) for word in arguments.split()]
    out = ["--out", str(tmp_path / "out")] if given[0] in ("sweep", "demo", "finetune") or "score" in given else []
    assert said in _refused(capsys, *given, *out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["generate hi", "circuit --pairs harm", "cache write --data alignment", "evaluate", "probe search"])
def test_a_config_of_other_sizes_than_the_weights_is_refused_first(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "other")
    sizes = {"hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 500, "num_attention_heads": 2**10}
    for changed, said in ((sizes, "says 500 layers"), ({**sizes, "num_hidden_layers": 3}, "has shape [264, 16], the config says")):
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **changed}))
        assert said in _refused(capsys, *command.split(), "--model", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_all_problems_of_a_pairs_file_are_said_at_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"base": "do a", "source": "do b", "target": ["S"], "foil": ["N"]}
    rows = [{"id": "a", **row}, {"id": "b", **row, "target": ["two"]}, {"id": "c", **row, "foil": ["S"]}, {"id": "d", **row}]
    file = tmp_path / "pairs.jsonl"
    for command in (["check", str(file)], ["sweep", "--pairs", str(file), "--out", str(tmp_path / "out")]):
        file.write_text("\n".join(json.dumps(one) for one in (*rows, {"id": "e"}, {"id": "f", "bse": "x"})))
        said = _refused(capsys, *command, "--model", folder, "--outcome", "logit-diff")
        for problem in ("2 problems", "line 5", "line 6", "pair 'b'", "pair 'c'"):
            assert problem in said
        file.write_text("\n".join(json.dumps(one) for one in rows))
        said = _refused(capsys, *command, "--model", folder, "--outcome", "logit-diff")
        assert "2 problems" in said
        assert "pair 'b'" in said
        assert "pair 'c'" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a,x,y,S,N", "a,v,w,S,N"], ["line 3: id 'a' was used before"]),
        (["a,x,,S,N", "b,x,y,S,S"], ["line 2: pair 'a': needs", "pair 'b': 'S' is both"]),
        (["a,x,y,two,N", "b,x,y", "c,x,y,,N"], ["pair 'a': outcome", "line 3: 3 fields", "pair 'c': outcome"]),
        (["a,x", "b,y"], ["line 2: 2 fields", "line 3: 2 fields"]),
    ],
)
@pytest.mark.parametrize("command", ["check", "sweep", "trace"])
def test_rows_that_are_no_pairs_hide_no_problem_of_the_others(
    folder: Path, tmp_path: Path, command: str, rows: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("\n".join(["id,base,source,target,foil", *rows]))
    asked = [command, str(file)] if command == "check" else [command, "--pairs", str(file), "--out", str(tmp_path / "out")]
    found = _refused(capsys, *asked, "--model", folder)
    for problem in said:
        assert problem in found
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [("target", True, "a text or a list of texts is"), ("messages", [1], "an object is"), ("base", 1.5, "a text is")],
)
def test_types_are_said_in_words(
    folder: Path, tmp_path: Path, column: str, value: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "a", "base": "x", "source": "y", "target": ["S"], "foil": ["N"], column: value}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert f"{column!r} holds {value!r}; {said} expected" in _refused(capsys, "check", tmp_path / "p.jsonl", "--model", folder)


def test_check_says_what_it_has_checked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"id": "a", "category": "x", "base": "do a", "source": "do bcd", "target": ["S"], "foil": ["N"]}))
    assert main(["check", str(file), "--model", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "1 pairs are in order" in said
    assert "1 x" in said
    assert "differ in length in 1 pairs" in said
    assert list(tmp_path.iterdir()) == [file]


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"jaxmed {jaxmed.__version__}\n"


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["prune"], 2), (["prune", "--help"], 0), (["study", "-h"], 0)])
def test_an_overview_names_the_commands(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().out
    assert stop.value.code == code
    assert ("sweep" if arguments[:1] in ([], ["--help"]) else "score" if arguments[0] == "prune" else "pruning") in said
    assert max(map(len, said.splitlines())) <= 120


# Tables


ROWS = [("HuggingFaceTB/SmolLM2-1.7B-Instruct", "1.7B", "Apache-2.0", "on the hub", "a note of several words that goes on and on")] * 3
COLUMNS = ("name", "parameters", "licence", "here", "note")


def _shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, terminal: bool) -> str:
    from rich.console import Console

    monkeypatch.setattr(show, "out", Console(width=width, force_terminal=terminal, highlight=False, soft_wrap=True, no_color=True))
    show.table("Models by name", COLUMNS, ROWS, 5)
    return capsys.readouterr().out


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (80, False), (40, True), (200, True), (20, False)])
def test_no_cell_of_a_table_is_lost_or_torn(
    width: int, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _shown(monkeypatch, capsys, width, terminal)
    for cell in ROWS[0][:4]:
        assert said.count(cell) >= 3, cell
    if terminal:
        assert all(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "").rstrip()) <= width for line in said.splitlines())
    else:
        assert ROWS[0][4] in said


def test_a_table_of_sites_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    sites = ("residual_in", "query", "key", "value", "attention_pattern", "head_out", "attention_out", "residual_mid", "neuron", "mlp_out")
    monkeypatch.setattr(show, "out", Console(width=80, force_terminal=True, highlight=False, soft_wrap=True, no_color=True))
    show.table("largest absolute difference", ("layer", *sites), [["29", *["3e-05"] * len(sites)]])
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if "3e-05" in line]
    assert row.count("3e-05") == len(sites)
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80


LONG = ("layer", "index", "mean", "share", "p", "p_adjusted", "pairs agreeing", "weakest in", "output vector promotes")
UNIT = ["1", "10", "-0.38", "-0.759", "0.5", "1", "2/2", "x -0.17", "'one' 'two' 'three' 'four' 'five'"]


@pytest.mark.parametrize(("width", "lines"), [(200, 1), (80, 2), (30, 9)])
def test_a_row_that_is_too_wide_has_its_last_cell_below(
    width: int, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(show, "out", Console(width=width, force_terminal=True, highlight=False, soft_wrap=True, no_color=True))
    show.table("largest mean effects", LONG, [UNIT, ["2", *UNIT[1:]]])
    said = capsys.readouterr().out.splitlines()
    first, second = (next(at for at, line in enumerate(said) if re.match(rf"(layer)?\s*{layer}\b", line)) for layer in (1, 2))
    assert second - first >= lines
    assert (second - first == lines) or width < 80
    assert ("layer 1" in said) == (width < 80)
    assert all(len(line.rstrip()) <= width for line in said[1:])


def _piped(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **environment},
    )


@pytest.mark.parametrize("command", ["models", "--help", "check harm"])
def test_a_reader_that_goes_ends_without_a_traceback(command: str) -> None:
    done = _piped(f'"$PYTHON" -m jaxmed.cli.main {command} | head -c 1 > /dev/null')
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert done.returncode == 0


def test_a_sweep_goes_on_without_a_reader(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"id": "a", "base": "do a", "source": "do b", "target": "S", "foil": "N"}))
    done = _piped(f'"$PYTHON" -m jaxmed.cli.main sweep --model {folder} --pairs {pairs} --unit mlp_out --out {out} 2>&1 | true')
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_what_is_piped_has_no_escape_sequences(environment: dict[str, str]) -> None:
    done = _piped('"$PYTHON" -m jaxmed.cli.main models; "$PYTHON" -m jaxmed.cli.main sweep --help; true', **environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "coloured"), [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
@pytest.mark.parametrize("arguments", [["sweep", "--help"], ["models"]])
def test_a_terminal_without_colours_gets_none(environment: dict[str, str], coloured: bool, arguments: list[str]) -> None:
    own, its = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM", "FORCE_COLOR")}
    env |= {"PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment}
    child = subprocess.Popen([sys.executable, "-m", "jaxmed.cli.main", *arguments], stdout=its, stderr=its, env=env)
    os.close(its)
    said = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal is an error on Linux
        while part := os.read(own, 65536):
            said += part
    os.close(own)
    assert child.wait() == 0, said
    colours = [code for code in re.findall(rb"\x1b\[([0-9;]*)m", said) if set(code.split(b";")) - {b"", b"0", b"1", b"2", b"3"}]
    assert bool(colours) == (coloured and arguments[0] == "sweep")


@pytest.mark.parametrize("said", ["RESOURCE_EXHAUSTED: 3 bytes", "INTERNAL: Out of memory allocating 3 bytes."])
def test_too_little_memory_is_one_message(said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(Models, "run", run)
    assert main(["models"]) == 2
    assert f"the memory does not hold this ({said})" in capsys.readouterr().err
