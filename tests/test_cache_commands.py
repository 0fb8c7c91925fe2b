"""Folders of activations from the command line, and what reads them: means of a patch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.bench import cache as bench
from jaxmed.cache import job
from jaxmed.cli.flags import SourceFlags
from jaxmed.cli.main import main
from jaxmed.effects.stored import stored_reference
from jaxmed.models.model import Model
from tests import tiny

SOURCES = [pair.source for pair in tiny.PAIRS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "m")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`cache write` of eight prompts, two of them in a shard."""
    monkeypatch.setattr(job, "prompts_of_a_shard", lambda each, count: 2)
    rows = [{"prompt": text, "id": f"p{number}"} for number, text in enumerate(SOURCES * 2)][:8]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", str(model), "--data", str(tmp_path / "prompts.jsonl"), "--sites", "neuron", "hook_z", "--positions", "all"]
    return ["cache", "write", *given, "--out", str(tmp_path / "a")]


def test_a_folder_is_written_described_verified_and_mended(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    assert main([*command, "--dry-run"]) == 0
    assert not out.exists()
    said = capsys.readouterr().out
    assert "neuron [prompt " in said
    assert "2 prompts are written together" in said
    assert main(command) == 0
    assert main(["cache", "info", str(out)]) == 0
    count = len((tmp_path / "prompts.jsonl").read_text().splitlines())
    assert f"{count} of {count} prompts are done; the run is finished" in capsys.readouterr().out
    assert main(["cache", "verify", str(out)]) == 0
    file = out / "hook_z" / "c" / "1" / "0" / "0" / "0" / "0"
    before, held = file.read_bytes(), bytearray(file.read_bytes())
    held[len(held) // 2] ^= 255
    file.write_bytes(held)
    capsys.readouterr()
    assert main(["cache", "verify", str(out)]) == 2
    said = capsys.readouterr().err
    assert "hook_z, prompts 2 to 3: damaged" in said
    assert "neuron" not in said
    assert main([*command, "--resume"]) == 2  # names what is damaged, and marks it
    assert main(["cache", "verify", str(out)]) == 2
    assert "2 of " in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert file.read_bytes() == before
    assert main(["cache", "verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--data", ""], "Give --data"),
        (["--positions", "last", "-1"], "one word"),
        (["--positions", "-900"], "No prompt has position"),
        (["--positions", "²"], "Unknown position '²'"),
        (["--positions", "--3"], "Unknown position '--3'"),
        (["--sites", "neurons"], "neuron"),
        (["--limit", "0"], "--limit 0"),
    ],
)
def test_what_cannot_be_kept_is_refused_first(
    command: list[str], changed: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *changed]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["info", "verify"])
def test_a_folder_of_something_else_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    assert main(["cache", kind, str(tmp_path / "b")]) == 2
    assert "holds no activations" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"model": "m"}, {"sites": ["../b"]}, {"sites": [3]}, {"sites": "neuron"}, {"sites": []}])
@pytest.mark.parametrize("kind", ["info", "verify"])
def test_a_manifest_of_something_else_is_refused(
    kind: str, change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"model": {}, "sites": ["neuron"], **change}))
    assert main(["cache", kind, str(tmp_path)]) == 2
    assert "names no sites. It was damaged" in capsys.readouterr().err


def test_another_request_is_refused_before_weights_are_loaded(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    monkeypatch.setattr(SourceFlags, "load", lambda self: pytest.fail("weights were loaded"))
    capsys.readouterr()
    assert main([*command, "--resume", "--dry-run"]) == 0
    assert " passes" not in capsys.readouterr().out, "nothing is left to do"
    assert main([*command, "--resume", "--form", "text"]) == 2
    assert "form: chat there, text now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--append", "."], "--append . is a folder"),
        (["--append", "text/x.md"], "which is a file"),
        (["--append", "n" * 300], "is too long"),
        (["--append", "latin"], "is not UTF-8"),
        (["--site", "neurons"], "Unknown site 'neurons'"),
        (["--tokens", "1e30"], "more than any run takes"),
    ],
)
def test_what_cannot_be_measured_or_noted_is_refused_first(
    model: Path, flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SourceFlags, "load", lambda self: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").touch()
    (tmp_path / "latin").write_bytes(b"\xff")
    assert main(["bench", "cache", "--model", str(model), *flags]) == 2
    assert said in capsys.readouterr().err


SWEEP: dict[str, Any] = {"unit": ("neuron", "head_out", "attention_out"), "patch": "mean"}


def test_a_mean_patch_with_the_sources_own_activations_is_the_mean_patch(plain_model: Model, tmp_path: Path) -> None:
    sites = ("neuron", "head_out", "attention_out")
    jm.activations(plain_model, SOURCES, sites, "last", out=tmp_path / "a")
    wanted = jm.sweep(plain_model, tiny.PAIRS, **SWEEP)
    found = jm.sweep(plain_model, tiny.PAIRS, **SWEEP, reference=tmp_path / "a")
    for name in ("neuron", "head_out", "attention_out"):
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-6)
    assert "folder of activations" in found.attrs["patch_told"]
    zero = jm.sweep(plain_model, tiny.PAIRS, **{**SWEEP, "patch": "zero"})
    assert np.abs(found.neuron - zero.neuron).max() > 1e-4


def test_means_count_every_prompt_alike_and_tokens_that_it_has_alone(
    plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "prompts_of_a_shard", lambda each, count: 2)
    prompts = ["a harm", "why is it very bad to harm so, and what else is there to be said about it?", "harm b"]
    table = jm.activations(plain_model, prompts, ("neuron", "hook_z"), "all", out=tmp_path / "a").load()
    found = stored_reference(str(tmp_path / "a"), plain_model, ("neuron", "head_out")).means["source"]
    for site, name in (("neuron", "neuron"), ("head_out", "hook_z")):
        wanted = table[name].mean("position").mean("prompt")  # NaN is left out
        np.testing.assert_allclose(found[site], wanted, atol=1e-6)


def test_references_that_do_not_fit_are_refused(plain_model: Model, tmp_path: Path) -> None:
    folder, others = tmp_path / "a", replace(plain_model, params=jax.tree.map(lambda x: 1.5 * x, plain_model.params))
    jm.activations(others, SOURCES, "neuron", out=folder)
    with pytest.raises(jm.UserError, match="of other weights"):
        jm.sweep(plain_model, tiny.PAIRS, patch="mean", reference=folder)
    with pytest.raises(jm.UserError, match="lacks the sites head_out"):
        jm.sweep(plain_model, tiny.PAIRS, unit="head_out", patch="mean", reference=folder)
    with pytest.raises(jm.UserError, match="goes with --patch mean alone"):
        jm.sweep(plain_model, tiny.PAIRS, patch="zero", reference=folder)
    with pytest.raises(jm.UserError, match="holds no activations"):
        jm.sweep(plain_model, tiny.PAIRS, patch="mean", reference=tmp_path / "none")


def test_a_sweep_goes_on_with_the_same_reference_alone(plain_model: Model, tmp_path: Path) -> None:
    for name, prompts in (("a", SOURCES), ("b", SOURCES[:1])):
        jm.activations(plain_model, prompts, "attention_out", out=tmp_path / name)
    given: dict[str, Any] = {"unit": "attention_out", "patch": "mean", "out": tmp_path / "run"}
    jm.sweep(plain_model, tiny.PAIRS, **given, reference=tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    jm.sweep(plain_model, tiny.PAIRS, **given, reference=tmp_path / "moved", resume=True)
    with pytest.raises(jm.UserError, match=r"another request(?s:.*)reference"):
        jm.sweep(plain_model, tiny.PAIRS, **given, reference=tmp_path / "b", resume=True)


def test_bench_cache_compares_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "prompts_of_a_shard", lambda each, count: min(count, 2))
    monkeypatch.chdir(tmp_path)
    written: list[int] = []
    write = bench._write_plainly
    monkeypatch.setattr(
        bench, "_write_plainly", lambda file, values, times: (write(file, values, times), written.append(file.stat().st_size))
    )
    given = ["--model", str(model), "--prompts", "5", "--tokens", "8", "--rounds", "2", "--append", "B.md"]
    assert main(["bench", "cache", *given]) == 0
    config = jm.load(str(model)).config
    assert written == [4 * 4 * config.layers * 8 * config.width] * 2  # four of the five prompts fill shards
    said = capsys.readouterr().out
    for what in ("write plainly", "read plainly", "compute a shard", "x the plain rate"):
        assert what in said
        assert what in (tmp_path / "B.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["B.md"]
    assert main(["bench", "cache", *given, "--rounds", "0"]) == 2
