"""Copies of a model as Orbax stores, and the command that converts."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.models.checkpoints.orbax_store import save_store
from tests import reference
from tests.exported import refused_with, same_bits, tensors_of, written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "axis"), [pytest.param("gpt2", "tensor", marks=pytest.mark.slow), ("qwen3-moe", "tensor"), ("llama3.2", "fsdp")]
)
def test_a_store_is_restored_under_another_mesh(tmp_path: Path, name: str, axis: str) -> None:
    reference.save(name, tmp_path / "source")
    model = jm.load(str(tmp_path / "source"), mesh=jm.make_mesh("data=1"))
    save_store(model, tmp_path / "store")
    mesh = jm.make_mesh(f"{axis}=2")
    again = jm.load(str(tmp_path / "store"), mesh=mesh)
    wanted = jm.load(str(tmp_path / "source"), mesh=mesh).params
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, wanted))
    assert jax.tree.map(lambda x: x.sharding, again.params) == jax.tree.map(lambda x: x.sharding, wanted)
    jm.export_folder(again, tmp_path / "copy")
    source, copy = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "copy")
    assert all(same_bits(source[key], copy[key]) for key in source)


def test_a_store_in_another_dtype_is_cast_after_reading(tmp_path: Path, folder: Path) -> None:
    wide, narrow = (jm.load(str(folder), dtype=dtype) for dtype in ("float32", "bfloat16"))
    save_store(wide, tmp_path / "wide")
    save_store(narrow, tmp_path / "narrow")
    equal = lambda one, two: jax.tree.all(jax.tree.map(same_bits, *(jax.tree.map(np.asarray, x.params) for x in (one, two))))  # noqa: E731
    assert equal(jm.load(str(tmp_path / "wide"), dtype="bfloat16"), narrow)
    assert equal(jm.load(str(tmp_path / "narrow"), dtype="bfloat16"), narrow)
    assert jm.load(str(tmp_path / "narrow"), dtype=None).config.dtype == "bfloat16"
    raised = jm.load(str(tmp_path / "narrow")).params["blocks"]["down"]
    assert raised.dtype == np.float32
    assert np.array_equal(raised, np.asarray(narrow.params["blocks"]["down"], np.float32))


def test_a_store_keeps_tokenizer_source_and_edits(tmp_path: Path, folder: Path) -> None:
    model = jm.load(str(folder))
    model.history = ({"kind": "mask"},)
    save_store(model, tmp_path / "store")
    again = jm.load(str(tmp_path / "store"))
    assert again.tokenizer("how")["input_ids"] == model.tokenizer("how")["input_ids"]
    assert again.history == model.history
    assert "**Warning.**" in (tmp_path / "store" / "README.md").read_text()
    card = json.loads((tmp_path / "store" / "jaxmed.json").read_text())
    assert card["source"]["weights"] == model.files_digest
    assert len(again.identity) == 64


def test_a_store_whose_card_does_not_fit_is_refused_with_all_mismatches(tmp_path: Path, folder: Path) -> None:
    save_store(jm.load(str(folder)), tmp_path / "store")
    card = json.loads((tmp_path / "store" / "jaxmed.json").read_text())
    changes = {"intermediate_size": 20, "tie_word_embeddings": False}
    changed = {**card, "dtype": "bfloat16", "config": {**card["config"], **changes}}
    (tmp_path / "store" / "jaxmed.json").write_text(json.dumps(changed))
    said = refused_with(tmp_path, lambda: jm.load(str(tmp_path / "store")))
    for part in ("missing array head", "array blocks/down has shape (3, 24, 16)", "array embedding has dtype float32"):
        assert part in said
    (tmp_path / "store" / "jaxmed.json").write_text(json.dumps({**card, "format": 9}))
    assert "format 9" in refused_with(tmp_path, lambda: jm.load(str(tmp_path / "store")))


def test_the_damaged_files_of_a_store_are_named_together(tmp_path: Path, folder: Path) -> None:
    save_store(jm.load(str(folder)), tmp_path / "store")
    largest, *_, smallest = sorted((tmp_path / "store" / "params").rglob("d/*"), key=lambda path: -path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    smallest.unlink()
    said = refused_with(tmp_path, lambda: jm.load(str(tmp_path / "store")))
    assert "2 problems" in said
    assert f"{largest.name} has 100 bytes" in said
    assert f"{smallest.name} is missing" in said


def _convert(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    try:
        code = main(["convert", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out + said.err


def test_convert_says_what_it_will_write_and_writes_it(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", str(folder), "--to")
    for to, out in (("orbax", tmp_path / "store"), ("huggingface", tmp_path / "copy")):
        code, said = _convert(capsys, *asked, to, "--out", str(out), "--dry-run")
        assert (code, out.exists()) == (0, False)
        assert "bytes" in said
        assert _convert(capsys, *asked, to, "--out", str(out))[0] == 0
        asked = ("--model", str(out), "--to")
    size = sum(array.nbytes for array in tensors_of(tmp_path / "copy").values())
    assert f"{size:,} bytes in all" in said
    source, copy = tensors_of(folder), tensors_of(tmp_path / "copy")
    assert all(same_bits(source[key], copy[key]) for key in copy)


def test_convert_refuses_with_one_message(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "copy"))
    for arguments, said in (
        (("--model", str(folder), "--to", "huggingface", "--out", str(folder)), "holds something already"),
        (("--model", str(folder), "--to", "keras", *out), "keras"),
        (("--model", str(folder), *out), "--to"),
        (("--model", "no-such", "--to", "orbax", *out), "no-such"),
        (("--model", str(folder), "--to", "orbax", "--adapter", str(folder), *out), "adapter_model.safetensors"),
    ):
        code, message = _convert(capsys, *arguments)
        assert code == 2
        assert said in message
    assert not (tmp_path / "copy").exists()


def test_a_store_with_values_that_are_not_finite_is_refused(tmp_path: Path, folder: Path) -> None:
    model = jm.load(str(folder))
    model.params["final_norm"] = model.params["final_norm"].at[2].set(np.inf)
    save_store(model, tmp_path / "store")
    assert "final_norm holds values that are not finite" in refused_with(tmp_path, lambda: jm.load(str(tmp_path / "store")))
