"""Folders as people publish them: heads that are stored though tied, files beside the weights, prefixes, text parts of other models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmed as jm
from tests import reference, tiny, tolerances

IDS = np.arange(3, 30)
ROPE = {"rope_theta": 1e4}


def logits(folder: Path, **options: Any) -> np.ndarray:
    """Our logits of `IDS`."""
    return np.asarray(jm.forward(jm.load(str(folder), **options), IDS)[0])


def expected(folder: Path) -> np.ndarray:
    """Those of transformers, which chooses among the folder's files itself."""
    model = reference.transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=reference.torch.float32)
    return reference.logits(model, IDS[None])


def change(folder: Path, **config: Any) -> None:
    """Writes keys into config.json."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))


@pytest.mark.parametrize("name", ["llama2", "qwen2.5", "gpt2"])
@pytest.mark.parametrize("differs", [True, False])
def test_a_head_that_is_stored_though_tied(tmp_path: Path, name: str, differs: bool) -> None:
    reference.save(name, tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    embedding = next(value for key, value in held.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
    held["lm_head.weight"] = embedding + (0.05 * np.random.default_rng(0).normal(size=embedding.shape).astype(np.float32) if differs else 0)
    save_file(held, file, {"format": "pt"})
    change(tmp_path, tie_word_embeddings=True)
    found = jm.load(str(tmp_path))
    assert found.config.tied is not differs
    assert np.abs(np.asarray(jm.forward(found, IDS)[0]) - expected(tmp_path)).max() <= tolerances.LOGITS
    jm.export_folder(found, tmp_path / "copy")
    assert np.array_equal(logits(tmp_path / "copy"), logits(tmp_path))


def _index(folder: Path, held: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(held, "model-00001-of-00002.safetensors")})
    )


STRAYS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "an index left over": _index,
    "shards left over": lambda folder, held: save_file({"x": np.zeros(1)}, folder / "model-00001-of-00002.safetensors"),
    "an adapter": lambda folder, held: save_file({"a.lora_A.weight": np.zeros((2, 3))}, folder / "adapter_model.safetensors"),
    "the original layout": lambda folder, held: save_file({"tok_embeddings.weight": np.zeros((2, 3))}, folder / "consolidated.safetensors"),
    "a copy in half precision": lambda folder, held: save_file(
        {key: value.astype(np.float16) for key, value in held.items()}, folder / "model.fp16.safetensors"
    ),
    "junk": lambda folder, held: (folder / "optimizer.safetensors").write_bytes(b"abc"),
}


@pytest.mark.parametrize("name", STRAYS)
def test_what_lies_beside_the_weights_is_passed_over(tmp_path: Path, name: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    before = logits(folder)
    STRAYS[name](folder, load_file(folder / "model.safetensors"))
    assert np.array_equal(logits(folder), before)


def test_the_original_layout_alone_is_no_model(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "consolidated.00.safetensors")
    with pytest.raises(jm.UserError, match="No safetensors file"):
        jm.load(str(folder))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "module.module.", "_fsdp_wrapped_module.", "language_model."]
)
def test_prefixes_of_compiled_and_parallel_modules_are_taken_off(tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    before = logits(folder)
    held = load_file(folder / "model.safetensors")
    save_file({prefix + name: value for name, value in held.items()}, folder / "model.safetensors")
    assert np.array_equal(logits(folder), before)
    assert prefix.split(".")[0] in capsys.readouterr().err
    within = {name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): value for name, value in held.items()}
    save_file(within, folder / "model.safetensors")
    assert np.array_equal(logits(folder), before)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    save_file({**held, "_orig_mod.model.norm.weight": held["model.norm.weight"]}, folder / "model.safetensors")
    with pytest.raises(jm.UserError, match="is there as"):
        jm.load(str(folder))


INNER = {"gemma3": "gemma3", "mistral3": "mistral", "qwen2_vl": "qwen2.5", "qwen2_5_vl": "qwen2.5", "llava": "llama2"}


@pytest.mark.parametrize("names", ["outside", "inside"])
@pytest.mark.parametrize("kind", INNER)
def test_the_text_part_of_a_model_of_images(tmp_path: Path, kind: str, names: str) -> None:
    reference.save(INNER[kind], tmp_path / "plain")
    raw, held = json.loads((tmp_path / "plain" / "config.json").read_text()), load_file(tmp_path / "plain" / "model.safetensors")
    before = logits(tmp_path / "plain")
    folder = tmp_path / "wrapped"
    folder.mkdir()
    text = {**raw, "model_type": f"{kind}_text" if kind.startswith("qwen") else raw["model_type"]}
    if kind.startswith("qwen"):
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
        text.setdefault("rope_theta", (text.pop("rope_parameters", None) or ROPE)["rope_theta"])
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text, "vision_config": {"hidden_size": 8}}))
    to = {"outside": "language_model.model.", "inside": "model.language_model."}[names]
    inside = {to + name.removeprefix("model.") if name.startswith("model.") else name: value for name, value in held.items()}
    if names == "outside" and "lm_head.weight" in inside:
        inside["language_model.lm_head.weight"] = inside.pop("lm_head.weight")
    images = {"outside": "vision_tower.x", "inside": "model.visual.x"}[names]
    save_file({**inside, images: np.zeros(2, np.float32), "multi_modal_projector.y": np.zeros(2, np.float32)}, folder / "model.safetensors")
    assert np.array_equal(logits(folder), before)


def test_the_flat_config_of_qwen2_vl(tmp_path: Path) -> None:
    reference.save("qwen2.5", tmp_path)
    before = logits(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    theta = (raw.pop("rope_parameters", None) or ROPE)["rope_theta"]
    flat = {"model_type": "qwen2_vl", "vision_config": {}, "image_token_id": 5, "vision_token_id": 6, "rope_theta": theta}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **flat, **rope}))
    held = load_file(tmp_path / "model.safetensors")
    save_file({**held, "visual.patch_embed.proj.weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert np.array_equal(logits(tmp_path), before)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "llama4_text"),
        ({"model_type": "gemma3", "text_config": {"model_type": "mamba"}}, "mamba"),
        ({"model_type": "mistral3", "text_config": 3}, "an object is expected"),
    ],
)
def test_text_parts_that_are_not_supported_are_named(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(jm.UserError, match=said):
        jm.load(str(folder))


@pytest.mark.parametrize("place", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_pipes_are_not_read(tmp_path: Path, place: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / place)
    with pytest.raises(jm.UserError, match="no regular file"):
        jm.load(str(folder))
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", Path("/dev/null")):
        with pytest.raises(jm.UserError, match="neither a model folder nor a file"):
            jm.load(str(path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_theta": 0}, "base is 0"),
        ({"rope_theta": -1.0}, "base is -1"),
        ({"rope_parameters": {"rope_theta": 0.0, "rope_type": "default"}}, "base is 0"),
        ({"partial_rotary_factor": 0}, "0 dimensions"),
        ({"max_position_embeddings": 1}, "max_length is 1"),
        ({"max_position_embeddings": 0}, "max_length is 0"),
        ({"hidden_size": 2**40}, "below"),
        ({"vocab_size": 2**30}, "the config says"),
        ({"num_hidden_layers": 10**4}, "layers"),
        ({"head_dim": 0}, "'head_dim' is 0; it is above zero"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads' is 0; it is above zero"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is True; a finite whole number"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' is '1e-5'; a finite number"),
        ({"rope_theta": True}, "'rope_theta' is True; a finite number"),
        ({"rope_scaling": []}, "'rope_scaling' is .*an object is expected"),
        ({"rope_scaling": {"type": "linear"}}, "of type 'linear' lack 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lack 'low_freq_factor' and"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "of type 'yarn' lack 'factor'"),
    ],
)
def test_configs_at_their_edges_are_refused_before_anything_is_allocated(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    change(folder, **config)
    with pytest.raises(jm.UserError, match=said):
        jm.load(str(folder))


def test_weights_that_fit_no_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxmed.models.checkpoints.assemble.host_memory", lambda: 1000)
    with pytest.raises(jm.UserError, match="of memory"):
        jm.load(str(tiny.write_checkpoint(tmp_path / "model")))


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_a_sentencepiece_tokenizer_names_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"\n\x05\n\x03<s>")
    monkeypatch.setattr("jaxmed.models.checkpoints.huggingface._is_installed", lambda name: name != package)
    with pytest.raises(jm.UserError, match=rf"{package}.*jaxmed\[sentencepiece\]"):
        jm.load(str(folder))
