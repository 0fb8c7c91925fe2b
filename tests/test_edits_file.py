"""`--edits FILE`: interventions from the command line, for generate and evaluate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.edits import read_edits
from jaxmed.cli.main import main
from jaxmed.interventions import edits
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("edits") / "model")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def _write(file: Path, content: Any) -> Path:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_file_says_what_the_functions_of_kinds_do(tmp_path: Path) -> None:
    direction = np.arange(16, dtype=np.float32)
    np.save(tmp_path / "d.npy", direction)
    entries = [
        {"kind": "zero", "site": "neuron", "layer": 1, "unit": [3, 17]},
        {"kind": "scale", "site": "hook_z", "layer": 0, "unit": 2, "factor": 0.5},
        {"kind": "steer", "site": "residual_out", "layer": 2, "direction": "d.npy", "coefficient": 2},
        {"kind": "ablate-direction", "site": "attention_out", "direction": direction.tolist()},
    ]
    wanted = edits.merge(
        edits.zero("neuron", 1, unit=[3, 17]),
        edits.scale("head_out", 0.5, 0, unit=2),
        edits.steer("residual_out", direction, 2.0, 2),
        edits.ablate_direction("attention_out", direction),
    )
    found = read_edits(_write(tmp_path / "e.json", entries))
    assert found.keys() == wanted.keys()
    for site, edit in wanted.items():
        for name in ("gate", "value", "add", "basis"):
            np.testing.assert_array_equal(getattr(found[site], name), getattr(edit, name))
    model = tiny.model("llama")
    ids = np.arange(3, 12)[None]
    assert np.array_equal(jm.forward(model, ids, found)[0], jm.forward(model, ids, wanted)[0])


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_edits_change_what_is_answered(folder: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write(tmp_path / "e.json", [{"kind": "zero", "site": "mlp_out"}])
    rows = _write(tmp_path / "rows.jsonl", json.dumps({"prompt": "how to"}) + "\n")
    asked = {
        "generate": ["generate", "how to", "--model", str(folder), "--tokens", "6"],
        "evaluate": ["evaluate", "--examples", str(rows), "--text", "", "--model", str(folder), "--tokens", "6", "--save-text"],
    }[command]
    said = []
    for number, more in enumerate(([], ["--edits", str(file)])):
        out = [] if command == "generate" else ["--out", str(tmp_path / f"{number}.json")]
        assert main([*asked, *more, *out]) == 0
        text = capsys.readouterr().out
        said.append(text if command == "generate" else json.loads((tmp_path / f"{number}.json").read_text())["answers"][0]["answer"])
    assert said[0] != said[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ({}, "no list of interventions"),
        ([], "no list of interventions"),
        ([3], "entry 1: an intervention is an object, not 3"),
        ([{"kind": "zer", "site": "neuron"}], "Did you mean 'zero'"),
        ([{"kind": "zero"}], "'zero' needs site"),
        ([{"kind": "zero", "site": "neuron", "layr": 1}], "Did you mean 'layer'"),
        ([{"kind": "zero", "site": "neurons"}], "neuron"),
        ([{"kind": "zero", "site": "neuron", "layer": "one"}], "a whole number or a list of them"),
        ([{"kind": "zero", "site": "neuron", "layer": True}], "a whole number or a list of them"),
        ([{"kind": "zero", "site": "neuron", "layer": 3}], "names layer 3; legal: 0 to 2"),
        ([{"kind": "zero", "site": "neuron", "unit": 24}], "names unit 24; legal: 0 to 23"),
        ([{"kind": "scale", "site": "neuron", "factor": "much"}], "a .npy file of them is expected"),
        ([{"kind": "scale", "site": "neuron", "factor": 1e999}], "finite numbers"),
        ([{"kind": "steer", "site": "residual_out", "direction": [0.0, 0.0]}], "not all of them zero"),
        ([{"kind": "steer", "site": "residual_out", "direction": "none.npy"}], "No such file"),
        ([{"kind": "steer", "site": "residual_out", "direction": [1.0, 2.0]}], "D = 16"),
        ([{"kind": "steer", "site": "neuron", "layer": 1, "direction": [1.0, 2.0]}], "F = 24"),
        ([{"kind": "ablate-direction", "site": "residual_out", "direction": [1.0, 2.0]}], "D = 16"),
        ([{"kind": "zero", "site": "neuron", "layer": [0, 1], "unit": [1, 2, 3]}], "lists of one length"),
        ([{"kind": "zero", "site": "neuron"}, {"kind": "zero", "site": "neuron", "unit": 2}], "neuron"),
    ],
)
def test_bad_files_get_one_message_each(
    folder: Path, content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxmed.cli.flags import ModelFlags

    monkeypatch.setattr(ModelFlags, "load", lambda self: pytest.fail("weights were loaded"))
    file = _write(tmp_path / "e.json", content)
    assert main(["generate", "how to", "--model", str(folder), "--edits", str(file)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "e.json" in said
    assert len(said) < 2000


def test_all_problems_of_a_file_are_said_at_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write(tmp_path / "e.json", [{"kind": "zero"}, {"kind": "zero", "site": "mlp_out"}, {"kind": "move", "site": "x"}])
    assert main(["generate", "how to", "--model", str(folder), "--edits", str(file)]) == 2
    assert re.search(r"2 problems.*entry 1.*entry 3", capsys.readouterr().err, re.S)


@pytest.mark.parametrize("more", [["--text", "", "--given"], ["--text", "", "--tasks", "arc_easy"]])
def test_edits_do_not_act_on_what_is_given_or_on_tasks(
    folder: Path, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write(tmp_path / "e.json", [{"kind": "zero", "site": "mlp_out"}])
    rows = _write(tmp_path / "rows.jsonl", json.dumps({"prompt": "how to", "response": "so"}) + "\n")
    asked = ["evaluate", "--model", str(folder), "--examples", str(rows), "--edits", str(file)]
    assert main([*asked, *more]) == 2
    assert "act on answers and perplexity alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "zero", "site": "mlp_out", "layer": 1},
        {"kind": "resample", "site": "neuron", "layer": [0, 2], "unit": [3, 17], "values": [0.5, -2.0]},
        {"kind": "ablate-direction", "site": "residual_out", "direction": [1.0, *[0.0] * 14, 2.0]},
        {"kind": "steer", "site": "residual_out", "layer": 1, "direction": [3.0, *[0.0] * 15], "coefficient": 2},
    ],
)
def test_perplexity_under_edits_is_that_of_edited_forward_passes(folder: Path, entry: dict[str, Any], tmp_path: Path) -> None:
    file = _write(tmp_path / "e.json", [entry])
    text = _write(tmp_path / "text.txt", "a b c d e\n\nf g h\n\n" + "q" * 20)
    asked = ["evaluate", "--model", str(folder), "--examples", "", "--text", str(text), "--edits", str(file)]
    assert main([*asked, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["perplexity"]
    model, losses = jm.load(str(folder)), []
    for part in text.read_text().split("\n\n"):
        ids = jm.tokens.text_ids(model.tokenizer, part)
        scores = jax.nn.log_softmax(jm.forward(model, ids, read_edits(file))[0][0], axis=-1)
        losses += [-float(scores[at, token]) for at, token in enumerate(ids[1:])]
    assert found["tokens"] == len(losses)
    assert found["value"] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)


@pytest.mark.parametrize(
    ("entry", "more", "said"),
    [
        ({"kind": "zero", "site": "mlp_out", "position": 1}, [], "names positions or rows"),
        ({"kind": "zero", "site": "mlp_out", "position": "current"}, [], "names positions or rows"),
        ({"kind": "scale", "site": "attention_pattern", "unit": 1, "factor": 0.5}, [], "pairs of tokens"),
        ({"kind": "zero", "site": "mlp_out"}, ["--edited", "generated"], "--edited generated"),
        ({"kind": "zero", "site": "mlp_out", "layer": 3}, [], "names layer 3"),
    ],
)
def test_edits_of_some_tokens_leave_no_perplexity(
    folder: Path,
    entry: dict[str, Any],
    more: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jaxmed.cli.flags.SourceFlags.load", lambda self: pytest.fail("weights were loaded"))
    file = _write(tmp_path / "e.json", [entry])
    assert main(["evaluate", "--model", str(folder), "--examples", "", "--edits", str(file), *more]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert "--text ''" in found


@pytest.mark.parametrize("position", ["current", [0, "current"]])
def test_a_file_may_name_tokens_as_they_are_written(tmp_path: Path, position: Any) -> None:
    found = read_edits(_write(tmp_path / "e.json", [{"kind": "zero", "site": "mlp_out", "position": position}]))
    named, wanted = found["mlp_out"].where, edits.zero("mlp_out", position=position)["mlp_out"].where
    assert named is not None
    assert wanted is not None
    np.testing.assert_array_equal(named.position, wanted.position)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize(("position", "said"), [(-1, "prompt's end"), (4000, "legal: 0 to"), ("last", '"current"'), ([], "whole number")])
def test_positions_are_refused_before_weights_are_loaded(
    folder: Path,
    command: str,
    position: Any,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = _write(tmp_path / "e.json", [{"kind": "zero", "site": "mlp_out", "position": position}])
    rows = _write(tmp_path / "rows.jsonl", json.dumps({"prompt": "how to"}) + "\n")
    monkeypatch.setattr("jaxmed.cli.flags.SourceFlags.load", lambda self: pytest.fail("weights were loaded"))
    asked = ["--examples", str(rows), "--model", str(folder), "--tokens", "4", "--edits", str(file)]
    assert main([command, *asked, *(["--text", ""] if command == "evaluate" else [])]) == 2
    assert said in capsys.readouterr().err
