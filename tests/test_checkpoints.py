"""Checkpoints: everything is used or refused, and all problems are said together."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmed as jm
from jaxmed.models.checkpoints.gguf_file import half_split
from tests import tiny

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "model")


def _refused(folder: Path) -> str:
    with pytest.raises(jm.UserError) as caught:
        jm.load(str(folder))
    return str(caught.value)


def _change(folder: Path, **tensors: np.ndarray | None) -> None:
    held = load_file(folder / WEIGHTS)
    held.update({k.replace("__", "."): v for k, v in tensors.items() if v is not None})
    save_file({k: v for k, v in held.items() if tensors.get(k.replace(".", "__"), 0) is not None}, folder / WEIGHTS)


def test_many_files_equal_one(tmp_path: Path, folder: Path) -> None:
    many = tiny.write_checkpoint(tmp_path / "many", shards=3)
    logits = [np.asarray(jm.forward(jm.load(str(path)), np.arange(9))[0]) for path in (folder, many)]
    assert np.array_equal(logits[0], logits[1])


def test_bfloat16_weights_are_read_exactly(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", dtype=ml_dtypes.bfloat16)
    stored = load_file(folder / WEIGHTS)["model.layers.1.mlp.down_proj.weight"]
    for dtype in ("float32", "bfloat16"):
        down = np.asarray(jm.load(str(folder), dtype=dtype).params["blocks"]["down"][1], np.float32)
        assert np.array_equal(down, stored.astype(np.float32).T)


def test_a_folder_without_tokenizer_loads(folder: Path) -> None:
    model = jm.load(str(folder))
    assert model.tokenizer is None
    with pytest.raises(jm.UserError, match="no tokenizer files"):
        jm.sweep(model, tiny.PAIRS)


def test_all_mismatches_are_reported_together(folder: Path) -> None:
    _change(folder, model__norm__weight=None, model__extra__weight=np.ones(3, np.float32), lm_head__weight=np.ones((2, 2), np.float32))
    said = _refused(folder)
    assert "3 problems" in said
    for part in ("missing tensor model.norm.weight", "unknown tensor model.extra.weight", "lm_head.weight has shape [2, 2]"):
        assert part in said


def test_values_that_are_not_finite_are_refused(folder: Path) -> None:
    held = load_file(folder / WEIGHTS)["model.layers.2.mlp.up_proj.weight"].copy()
    held[3, 4] = np.nan
    _change(folder, model__layers__2__mlp__up_proj__weight=held)
    assert "model.layers.2.mlp" in _refused(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 4000])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    said = _refused(folder)
    assert WEIGHTS in said
    assert "truncated" in said


def test_missing_files_are_named(tmp_path: Path, folder: Path) -> None:
    many = tiny.write_checkpoint(tmp_path / "many", shards=3)
    (many / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in _refused(many)
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "Pickled weights are not read" in _refused(folder)
    (folder / "config.json").unlink()
    assert "No config.json" in _refused(folder)


def test_an_index_that_names_an_absent_tensor(tmp_path: Path) -> None:
    many = tiny.write_checkpoint(tmp_path / "many", shards=2)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    (many / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.ghost" in _refused(many)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_sink": 4}, "'attention_sink'"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"hidden_act": "swish9"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, "'twist'"),
        ({"num_hidden_layers": "many"}, "cannot be used"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(folder: Path, changes: dict, said: str) -> None:
    (folder / "config.json").write_text(json.dumps(tiny.config_json(**changes)))
    assert said in _refused(folder)


def test_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in _refused(folder)
    raw = tiny.config_json()
    del raw["hidden_size"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert "lacks 'hidden_size'" in _refused(folder)


def test_a_damaged_gguf(tmp_path: Path) -> None:
    from jaxmed.models.catalog import locate

    whole = locate("smollm2-135m-instruct").read_bytes()
    for content in (b"", b"GGUF", whole[:1000], whole[: len(whole) // 2]):
        (tmp_path / "m.gguf").write_bytes(content)
        assert "m.gguf" in _refused(tmp_path / "m.gguf")


def test_half_split_undoes_the_interleaved_order() -> None:
    rows = np.arange(2 * 8)[:, None] * np.ones((1, 3))
    interleaved = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert np.array_equal(half_split(interleaved, 2), rows)


def test_a_known_file_with_a_wrong_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxmed.models import catalog

    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path))
    catalog.cached_file(catalog.DEFAULT).parent.mkdir(parents=True)
    catalog.cached_file(catalog.DEFAULT).write_bytes(b"GGUF something else")
    with pytest.raises(jm.UserError, match="SHA-256"):
        jm.load(catalog.DEFAULT)


def test_an_unknown_name_and_a_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(jm.UserError, match="Did you mean 'smollm2-135m-instruct'"):
        jm.load("smollm2-135m-instrct")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(jm.UserError, match="Without a network"):
        jm.load("nobody/such-model")


def test_the_weights_hash_names_the_weights(tmp_path: Path, folder: Path) -> None:
    first = jm.load(str(folder)).identity
    _change(folder, model__norm__weight=np.full(16, 2.0, np.float32))
    assert len(first) == 64
    assert jm.load(str(folder)).identity != first
