"""Values of the wrong type and texts that are none, wherever a user's text enters: one message, and never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.evaluation.strongreject import read_template
from jaxmed.files import odd_text, parse_json, parse_yaml, read_json
from jaxmed.models.checkpoints.huggingface import read_json as read_model_json
from jaxmed.prompts.examples import COLUMNS as EXAMPLE_COLUMNS
from jaxmed.prompts.readers import COLUMNS as PAIR_COLUMNS
from jaxmed.pruning.masks import read_mask
from jaxmed.tokens import batch, render, text_ids
from tests import tiny
from tests.damage import ODD_VALUES

PAIR = {"id": "a", "category": "c", "base": "x", "source": "y", "target": ["S"], "foil": ["N"]}
EXAMPLE = {"prompt": "p", "response": "r"}
HALVES = ("\ud800", "Tell me \udc00.", "both, swapped: \udca1\ud83d")
CHATS = (
    {"base": 1, "source": 2},
    {"base": [], "source": []},
    {"base": "hi", "source": "ho"},
    {"base": [1], "source": [{}]},
    {"base": [{"role": "user"}], "source": [{"role": 1, "content": "x"}]},
    {"base": [{"role": "user", "content": ["x"]}], "source": [{"role": "user", "content": None}]},
    [{"role": "user", "content": "x"}],
)
VALUES = (*ODD_VALUES, *HALVES, *CHATS, [HALVES[0]], {HALVES[1]: 1}, {"x": [{"y": HALVES[2]}]}, [["a"]])


def _read_pair(row: dict[str, Any]) -> None:
    for side in ("base", "source"):
        render(tiny.tokenizer(), jm.read_pairs([row])[0], side)


def _build_pair(row: dict[str, Any]) -> None:
    pair = jm.PromptPair(**row)
    for side in ("base", "source"):
        render(tiny.tokenizer(), pair, side)


def _read_example(row: dict[str, Any]) -> None:
    render(tiny.tokenizer(), jm.read_examples([row])[0])


CELLS: dict[str, tuple[Callable[[dict[str, Any]], None], dict[str, Any], tuple[str, ...]]] = {
    "pairs that are read": (_read_pair, PAIR, (*PAIR_COLUMNS, "other")),
    "pairs that are made": (_build_pair, PAIR, (*PAIR_COLUMNS, "extra")),
    "examples": (_read_example, EXAMPLE, (*EXAMPLE_COLUMNS, "messages", "goal", "instruction", "output", "Behavior", "type", "focus")),
}


@pytest.mark.parametrize("kind", CELLS)
def test_any_value_in_any_column_is_taken_or_refused_in_words(kind: str) -> None:
    use, row, columns = CELLS[kind]
    said = []
    for column in columns:
        for value in VALUES:
            try:
                use({**row, column: value})
            except jm.UserError as error:
                said.append(len(str(error)))
    assert len(said) > len(columns) * len(VALUES) / 3
    assert min(said) > 10
    assert max(said) < 3000


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("column", [*PAIR_COLUMNS, "note"])
def test_half_a_character_is_named_by_its_column(tmp_path: Path, column: str, half: str) -> None:
    value: Any = [half] if column in ("target", "foil") else half
    if column == "messages":
        value = {side: [{"role": "user", "content": half}] for side in ("base", "source")}
    (tmp_path / "p.jsonl").write_text(json.dumps(PAIR | {"id": "fine"}) + "\n" + json.dumps({**PAIR, column: value}))
    with pytest.raises(jm.UserError, match=rf"line 2: '{column}'.* holds half of a surrogate pair"):
        jm.read_pairs(tmp_path / "p.jsonl")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.csv", "rows"])
def test_half_a_character_in_examples(tmp_path: Path, name: str, half: str) -> None:
    rows = [{"prompt": "fine", "response": "fine"}, {"prompt": "p", "response": half}]
    content = {
        "e.jsonl": "\n".join(json.dumps(row) for row in rows),
        "e.json": json.dumps(rows),
        "e.csv": f"prompt,response\np,{half}\n",
    }
    (tmp_path / name).write_bytes(content.get(name, "").encode("utf-8", "surrogatepass"))
    with pytest.raises(jm.UserError, match="half of a surrogate pair" if name != "e.csv" else "not UTF-8"):
        jm.read_examples(rows if name == "rows" else tmp_path / name)


def _json(content: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "f.json").write_text(json.dumps(content))
        return folder / "f.json"

    return write


def _mask(rule: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        metadata = {"format": "jaxmed-mask-1", "shapes": json.dumps({"w": [2, 2]}), "rule": json.dumps(rule)}
        save_file({"w": np.zeros(0, np.int64)}, folder / "m.safetensors", metadata)
        return folder / "m.safetensors"

    return write


FILES: dict[str, tuple[Callable[[Any], Callable[[Path], Path]], Callable[[Path], Any]]] = {
    "any JSON": (_json, read_json),
    "config.json": (lambda half: _json({"model_type": half}), read_model_json),
    "the classifier's rubric": (lambda half: _json({"strongreject_finetuned": half + "{prompt} {response}"}), read_template),
    "a mask's rule": (lambda half: _mask({"of": half}), read_mask),
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", FILES)
def test_half_a_character_in_files(tmp_path: Path, kind: str, half: str) -> None:
    make, read = FILES[kind]
    with pytest.raises(jm.UserError, match="half of a surrogate pair"):
        read(make(half)(tmp_path))


@pytest.mark.parametrize("half", HALVES)
def test_half_a_character_where_a_text_is_given_in_python(half: str) -> None:
    tokenizer = tiny.tokenizer()
    for use in (
        lambda: render(tokenizer, half),
        lambda: render(tokenizer, [{"role": "user", "content": half}]),
        lambda: render(tokenizer, jm.Example(half)),
        lambda: batch(tokenizer, ["fine", half]),
        lambda: text_ids(tokenizer, half),
    ):
        with pytest.raises(jm.UserError, match="half of a surrogate pair"):
            use()


@pytest.mark.parametrize("value", [None, 3, 1.5, True, {"a": 1}, [3], b"bytes", ["a", "b"]])
def test_what_is_no_text_is_not_asked(value: Any) -> None:
    with pytest.raises(jm.UserError):
        render(tiny.tokenizer(), value)


YAML = (
    *("[" * 100_000, "limit: 2020-99-99", "limit: !!int x", "limit: !!float x", "limit: !!timestamp x", "limit: !!bool x", "? [a]\n: b"),
    *('pairs: "\\uD800"', '"\\uDC00": 1', "limit: .inf", "limit: .nan", "limit: 1e999", "layers: &a [*a]", "x: " + "9" * 5000),
    *("pairs: {a: b}", "- a", "pairs: \x07", "a: !!python/object:os.system x", "pairs: !!set {a}", "pairs: !!omap [a: 1]", "\udcff"),
)


@pytest.mark.parametrize("text", YAML, ids=lambda text: ascii(text[:30]))
def test_odd_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "c.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(["sweep", "--dry-run", "--config", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxmed: ")
    assert "Traceback" not in said


@pytest.mark.parametrize("flag", ["prompt", "--prefill", "--stop", "--system", "--examples", "--model", "--limit", "--edits"])
def test_arguments_that_are_no_text(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert main(["generate", *(["hello"] if flag != "prompt" else []), *([flag] if flag != "prompt" else []), "caf\udce9"]) == 2
    said = capsys.readouterr().err
    assert "caf\\udce9" in said
    assert len(said.splitlines()) < 5


def test_texts_that_are_some_pass() -> None:
    whole = {"a": ["é", "\U0001f600", "\u2028", "\x00", "\ufeff"], "b": ({"c": None},), "\u200b": 3}
    assert odd_text(whole) == ""
    assert parse_json('"\\ud83d\\ude00"') == parse_yaml('"\U0001f600"') == "\U0001f600"


COLUMNS_OF_TABLES = (
    {"layer": 3, "outcome": "x", "mlp_out": 2, "mlp_out_mean": 3, "done": 1, "position": 5, "noise_floor": 1, "base_outcome": 2},
    {"a/b": 1, "..": 2, "zarr.json": 3, "\x00": 4, "x" * 500: 5, "é ü": "\x00", "pairs": [1], "routing_margin": {"x": 1}},
    {"pair": 1, "split ": 1, "mlp_out_index": 4, "head_index": 3, "control group": "q", "expert": None, "of_layer": 1},
)


@pytest.mark.parametrize(
    ("extra", "more"),
    list(zip(COLUMNS_OF_TABLES, ({"outcome": ("log-odds", "logprob")}, {}, {"position": -1}), strict=True)),
)
def test_extra_columns_of_any_name_are_carried_along(tmp_path: Path, model: Any, extra: dict[str, Any], more: dict[str, Any]) -> None:
    pairs = [jm.PromptPair(one.id, one.base, one.source, one.target, one.foil, extra=extra) for one in tiny.PAIRS]
    found = jm.sweep(model, pairs, unit="mlp_out", out=tmp_path / "out", **more)
    plain = jm.sweep(model, tiny.PAIRS, unit="mlp_out", **more)
    np.testing.assert_array_equal(found["mlp_out"], plain["mlp_out"])
    labels = [str(found[name].values[0]) for name in found.coords if found[name].dims == ("pair",)]
    assert {str(value).rstrip("\x00") for value in extra.values()} <= {*labels}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("odd") / "model")
    tiny.tokenizer().save_pretrained(folder)
    return jm.load(str(folder))
