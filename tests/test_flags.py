"""Flags: declared once, inherited by every command, and explained."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tyro._docstrings import get_field_docstring

import jaxmed as jm
from jaxmed.cli.flags import LoadFlags, ModelFlags, SourceFlags
from jaxmed.cli.main import COMMANDS, main
from jaxmed.cli.parser import flags_of
from tests import tiny

WITHOUT_MODEL = (
    "agreement",
    "bench load",
    "cache info",
    "cache verify",
    "models",
    "report",
    "prune combine",
    "prune compression",
    "status",
)
FRAGMENT = re.compile(r"(Of|At|That|The same|The latter|For nothing|Goes on|Gives|Lies)\b")


def _fields() -> list[tuple[str, type, dataclasses.Field]]:
    return [(name, kind, one) for name, kind in COMMANDS.items() for one in dataclasses.fields(kind)]


def _declared_by(kind: type, field: str) -> type:
    return next(one for one in kind.__mro__ if field in inspect.get_annotations(one))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_help_line_with_a_subject(name: str) -> None:
    for one in dataclasses.fields(COMMANDS[name]):
        text = get_field_docstring(COMMANDS[name], one.name, ()) or ""
        assert len(re.findall(r"[\w'-]+", text)) >= 3, one.name
        assert not FRAGMENT.match(text), (one.name, text)
        assert text.endswith("."), (one.name, text)


def test_no_command_repeats_the_declaration_of_another() -> None:
    owners: dict[Any, set[type]] = defaultdict(set)
    for _, kind, one in _fields():
        owners[one.name, get_field_docstring(kind, one.name, ()), one.default].add(_declared_by(kind, one.name))
    assert not {key[0]: owner for key, owner in owners.items() if len(owner) > 1}


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(WITHOUT_MODEL)))
def test_every_command_that_loads_a_model_takes_the_same_flags(name: str) -> None:
    kind = COMMANDS[name]
    if name == "study pruning":  # several models: one value each
        assert issubclass(kind, LoadFlags)
        assert {"--models", "--revisions", "--adapters", "--masks"} <= set(flags_of(kind))
        return
    assert issubclass(kind, SourceFlags)
    assert {f"--{one.name.replace('_', '-')}" for one in dataclasses.fields(ModelFlags)} <= set(flags_of(kind))
    assert issubclass(kind, ModelFlags) or name == "prune apply"  # whose mask is what it writes


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A tiny model with a LoRA adapter, scored with it: the flags that load it, and the folder of everything."""
    folder = tmp_path_factory.mktemp("adapted")
    tiny.write_checkpoint(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    draw = np.random.default_rng(0)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": draw.normal(size=shape).astype(np.float32)
        for layer in range(3)
        for part, shape in (("A", (2, 16)), ("B", (32, 2)))
    }
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    for name, answer in (("bad", "no"), ("good", "yes")):
        rows = [{"prompt": f"{name} {i}", "response": f"{answer} {i}", "kind": "harmful"} for i in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loads = ["--model", str(folder / "model"), "--adapter", str(folder / "adapter")]
    sets = ["--behaviour", str(folder / "bad.jsonl"), "--preserve", str(folder / "good.jsonl")]
    assert main(["prune", "score", *loads, *sets, "--out", str(folder / "scores")]) == 0
    select = ["prune", "select", "--scores", str(folder / "scores"), "--q", "0.02", "--p", "0.01"]
    assert main([*select, "--out", str(folder / "mask.safetensors")]) == 0
    return loads, folder


def _measured(folder: Path, command: str) -> list[str]:
    bad, good, mask = (str(folder / name) for name in ("bad.jsonl", "good.jsonl", "mask.safetensors"))
    asked = ["--masks", mask, "--behaviour", bad, "--preserve", good, "--requests", bad, "--text", ""]
    return {
        "curve": ["--scores", str(folder / "scores"), "--tests", bad, "--text", "", "--qs", "0.02"],
        "transfer": ["--masks", mask, "--tests", bad, "--text", ""],
        "dissociation": [*asked, "--twins", "", "--explanations", ""],
        "attack": [*asked, "--refusals", bad, "--prefill", "1"],
        "apply": ["--mask", mask],
    }[command]


@pytest.mark.parametrize("command", ["curve", "transfer", "dissociation", "attack", "apply"])
def test_scores_of_an_adapted_model_are_accepted_by_what_follows(
    adapted: tuple[list[str], Path], command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loads, folder = adapted
    asked = ["prune", command, *_measured(folder, command), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*asked, *loads]) == 0
    assert main([*asked, *loads[:2]]) == 2  # without its adapter it is another model
    assert "of other weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_masked_model_is_another_model(adapted: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loads, folder = adapted
    mask = ["--mask", str(folder / "mask.safetensors")]
    asked = ["prune", "curve", *_measured(folder, "curve"), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*asked, *loads, *mask]) == 2
    assert "of other weights" in capsys.readouterr().err
    generate = ["generate", "how to", *loads, "--tokens", "4"]
    assert main(generate) == main([*generate, *mask]) == 0
    first, second = re.findall(r"> how to\n(.*?)\n\n", capsys.readouterr().out, re.S)
    assert first != second


@pytest.mark.parametrize("command", ["sweep", "generate", "convert"])
@pytest.mark.parametrize("flag", ["--mask", "--adapter"])
def test_a_mask_or_adapter_that_cannot_be_read_is_refused_by_name(
    adapted: tuple[list[str], Path], command: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"sweep": ["--out", str(tmp_path / "out")], "generate": ["hi"], "convert": ["--to", "orbax", "--out", str(tmp_path / "out")]}
    assert main([command, *more[command], *adapted[0][:2], flag, str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_source_values_come_from_a_sibling_model(
    adapted: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--source-adapter` alone: the same model with the adapter. The residual stream carries the whole difference."""
    loads, _ = adapted
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    pairs.write_text(json.dumps({"id": "a", "base": "how to", "source": "how not to", "target": ["S"], "foil": ["N"]}) + "\n")
    asked = ["sweep", *loads[:2], "--pairs", str(pairs), "--unit", "residual_out", "--out", str(out)]
    assert main(["check", str(pairs), *loads[:2], "--source-adapter", loads[3]]) == 0
    assert main([*asked, "--source-adapter", loads[3]]) == 0
    table = jm.open_results(out).load()
    total = float(table.source_outcome[0] - table.base_outcome[0])
    assert abs(total) > 1e-3
    assert float(table.residual_out[0, -1]) == pytest.approx(total, abs=1e-4)
    assert table.attrs["contrast"] == "model"
    assert table.attrs["source_model"]
    assert main([*asked, "--resume"]) == 2  # without its source model it is another run
    assert main([*asked, "--contrast", "model", "--out", str(tmp_path / "none")]) == 2
    tiny.write_checkpoint(tmp_path / "wide", hidden_size=24)
    tiny.tokenizer().save_pretrained(tmp_path / "wide")
    capsys.readouterr()
    assert main([*asked, "--out", str(tmp_path / "none"), "--source-model", str(tmp_path / "wide")]) == 2
    assert "has width 24" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
