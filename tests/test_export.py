"""Copies of a model as Hugging Face folders: bits, logits, records of edits, what is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers

import jaxmed as jm
from jaxmed.models.checkpoints.orbax_store import save_store
from tests import gguf_export, reference, tiny, tolerances
from tests.exported import refused_with, same_bits, tensors_of, written

torch = reference.torch
QUICK = ("gpt2", "llama3.2", "phi3", "qwen3-moe")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in reference.CONFIGS]
GGUFS = [
    ("llama3.1", "llama"),
    *(
        pytest.param(name, architecture, marks=pytest.mark.slow)
        for architecture, names in {
            "llama": ["llama2", "mistral-unlimited", "mixtral"],
            "qwen2": ["qwen2.5"],
            "qwen3": ["qwen3"],
            "qwen3moe": ["qwen3-moe"],
            "gemma": ["gemma"],
            "gemma2": ["gemma2"],
            "gemma3": ["gemma3"],
            "olmo2": ["olmo2", "olmo3"],
            "phi3": ["phi3", "phi4-mini"],
            "granite": ["granite"],
            "gpt2": ["gpt2"],
        }.items()
        for name in names
    ),
]
"""Model and GGUF architecture; Llama 3.1's RoPE becomes factors there."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "model")


def _with_torch(folder: Path, **arguments: Any) -> Any:
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **arguments
    )
    made, info = found
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return made.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_has_the_bits_and_the_logits_of_its_source(tmp_path: Path, name: str) -> None:
    made = reference.save(name, tmp_path / "source")
    jm.export_folder(jm.load(str(tmp_path / "source")), tmp_path / "copy")
    source, copy = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "copy")
    assert source.keys() == copy.keys()
    assert all(same_bits(source[key], copy[key]) for key in source)
    ids = reference.tokens(60)
    assert np.array_equal(reference.logits(_with_torch(tmp_path / "copy"), ids), reference.logits(made, ids))


@pytest.mark.parametrize("name", ["gemma2", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_bfloat16_weights_keep_their_bits_norms_included(tmp_path: Path, name: str) -> None:
    reference.save(name, tmp_path / "source", torch.bfloat16)
    jm.export_folder(jm.load(str(tmp_path / "source"), dtype=None), tmp_path / "copy")
    source, copy = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "copy")
    assert {array.dtype for array in copy.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(same_bits(source[key], copy[key]) for key in source)


def test_the_config_says_the_dtype_that_was_written(tmp_path: Path) -> None:
    reference.save("llama2", tmp_path / "source", torch.bfloat16)
    jm.export_folder(jm.load(str(tmp_path / "source"), dtype="float32"), tmp_path / "copy")
    source, copy = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "copy"))
    assert copy == {**source, "dtype": "float32"}
    assert _with_torch(tmp_path / "copy").dtype == torch.float32


def test_many_files_equal_one(tmp_path: Path, folder: Path) -> None:
    model = jm.load(str(folder))
    jm.export_folder(model, tmp_path / "many", file_bytes=9000)
    files = sorted(tmp_path.glob("many/*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    source, copy = tensors_of(folder), tensors_of(tmp_path / "many")
    source.pop("lm_head.weight", None)
    assert source.keys() == copy.keys()
    again = jm.load(str(tmp_path / "many"))
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
    _with_torch(tmp_path / "many")


def test_tokenizer_and_generation_config_come_along(tmp_path: Path, folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    jm.export_folder(jm.load(str(folder)), tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    messages = [{"role": "user", "content": "how to héllo"}]
    kept, loaded = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "copy"))
    assert kept.apply_chat_template(messages) == loaded.apply_chat_template(messages)


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_a_model_split_over_devices_exports_the_same(tmp_path: Path, axis: str) -> None:
    reference.save("mixtral", tmp_path / "source")
    jm.export_folder(jm.load(str(tmp_path / "source"), mesh=jm.make_mesh(f"{axis}=2")), tmp_path / "copy")
    source, copy = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "copy")
    assert all(same_bits(source[key], copy[key]) for key in source)


def test_an_edit_is_recorded_warned_of_and_kept(tmp_path: Path, folder: Path) -> None:
    model = jm.load(str(folder))
    model.params["blocks"]["down"] = model.params["blocks"]["down"].at[1, 3].set(0.0)
    edit = {"kind": "zero neuron", "layer": 1, "neuron": 3}
    jm.export_folder(model, tmp_path / "copy", edit)
    source, copy = tensors_of(folder), tensors_of(tmp_path / "copy")
    changed = [name for name in copy if not same_bits(source[name], copy[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert "**Warning.**" in (tmp_path / "copy" / "README.md").read_text()
    assert json.loads((tmp_path / "copy" / "jaxmed_edit.json").read_text())["edits"] == [edit]
    jm.export_folder(jm.load(str(tmp_path / "copy")), tmp_path / "again", {"kind": "second"})
    assert json.loads((tmp_path / "again" / "jaxmed_edit.json").read_text())["edits"] == [edit, {"kind": "second"}]


def test_an_unedited_export_has_no_record(tmp_path: Path, folder: Path) -> None:
    jm.export_folder(jm.load(str(folder)), tmp_path / "copy")
    assert not {"README.md", "jaxmed_edit.json"} & {path.name for path in (tmp_path / "copy").iterdir()}


@pytest.mark.parametrize("write", [jm.export_folder, save_store])
def test_attacks_are_not_written(tmp_path: Path, folder: Path, write: Callable) -> None:
    model = jm.load(str(folder))
    model.history = ({"kind": "lora", "tag": "attack"},)
    assert "tagged 'attack'" in refused_with(tmp_path, lambda: write(model, tmp_path / "copy"))
    model.history = ()
    assert "memory only" in refused_with(tmp_path, lambda: jm.export_folder(model, tmp_path / "copy", {"tag": "Attack"}))


@pytest.mark.parametrize("write", [jm.export_folder, save_store])
def test_folders_that_hold_something_are_left_alone(tmp_path: Path, folder: Path, write: Callable) -> None:
    model = jm.load(str(folder))
    assert "holds something already" in refused_with(tmp_path, lambda: write(model, folder))
    assert "is a file" in refused_with(tmp_path, lambda: write(model, folder / "config.json"))
    (tmp_path / "empty").mkdir()
    write(model, tmp_path / "empty")
    assert jm.load(str(tmp_path / "empty")).config == model.config


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_broken_off_export_leaves_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException) -> None:
    model = jm.load(str(folder))

    def fail(*_: Any) -> None:
        raise stop

    monkeypatch.setattr("jaxmed.models.checkpoints.export.write_index", fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((jm.UserError, KeyboardInterrupt), match=r"No space left|^$"):
        jm.export_folder(model, tmp_path / "copy")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_with_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = jm.load(str(folder))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "0.0 MB are free" in refused_with(tmp_path, lambda: jm.export_folder(model, tmp_path / "copy"))


def test_what_cannot_be_written_is_said(tmp_path: Path, folder: Path) -> None:
    write = lambda model, **more: refused_with(tmp_path, lambda: jm.export_folder(model, tmp_path / "copy", **more))  # noqa: E731
    assert "no source config" in write(tiny.model("llama"))
    assert "kept as int8" in write(jm.load(str(folder), int8=True))
    model = jm.load(str(folder))
    assert "JSON values" in write(model, edit={"mask": object()})
    down = model.params["blocks"]["down"]
    model.params["blocks"]["down"] = down.at[0, 0, 0].set(np.nan)
    assert "blocks/down of layer 0 holds values that are not finite" in write(model)
    model.params["blocks"]["down"] = down[:, :5]
    model.params["extra"] = down
    assert "2 problems" in write(model)


@pytest.mark.parametrize(("name", "architecture"), GGUFS)
def test_a_gguf_file_becomes_a_folder_that_transformers_loads(tmp_path: Path, name: str, architecture: str) -> None:
    reference.save(name, tmp_path / "source")
    model = jm.load(str(gguf_export.export(tmp_path / "source", tmp_path / "m.gguf", architecture)))
    jm.export_folder(model, tmp_path / "copy")
    made = _with_torch(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["architectures"] == [type(made).__name__]
    ids = reference.tokens(60)
    assert np.abs(np.asarray(jm.forward(model, ids)[0]) - reference.logits(made, ids)).max() <= tolerances.TINY_LOGITS
    again = jm.load(str(tmp_path / "copy"))
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))


@pytest.mark.slow
def test_the_default_model_as_a_folder(default_model: jm.Model, tmp_path: Path) -> None:
    jm.export_folder(default_model, tmp_path / "copy")
    made = _with_torch(tmp_path / "copy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    messages = [{"role": "user", "content": "How do locks work?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == default_model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    logits = np.asarray(jm.forward(default_model, ids)[0])
    assert np.abs(logits - reference.logits(made, np.asarray([ids]))).max() <= tolerances.LOGITS
    assert made.generation_config.eos_token_id == tokenizer.eos_token_id
