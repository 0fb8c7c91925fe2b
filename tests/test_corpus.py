"""Damaged checkpoints that once got past the readers, or ended in another exception or a hang: each gives one message now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmed as jm
from jaxmed.models.checkpoints.gguf_file import open_gguf
from jaxmed.models.checkpoints.huggingface import open_folder, read_json
from jaxmed.models.families import read_config
from jaxmed.models.load import load
from tests import damage, tiny
from tests.test_fuzz import CONFIGS, WEIGHTS, tiny_gguf


def _refused(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(jm.UserError) as caught:
        action(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gemma2", {"num_hidden_layers": 2**31 - 1}, "are the most that is read"),  # a list of two thousand million windows
        ("gpt2", {"n_layer": 2**31 - 1}, "layers is 2147483647"),
        ("llama", {"num_key_value_heads": 0.5}, "kv_heads is 0"),  # a division by zero
        ("llama", {"head_dim": 2**40}, "head_width is"),
        ("llama", {"head_dim": 7}, "7 dimensions of heads of 7 are rotated"),  # rotated halves of different widths
        ("llama", {"num_attention_heads": 3}, "do not divide"),
        ("llama", {"hidden_size": 10**4000}, "width is 1000"),
        ("mixtral", {"num_local_experts": 10**4000, "intermediate_size": 10**4000}, "too large to show"),  # 8,000 digits
        ("llama", {"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ("llama", {"rms_norm_eps": -1.0}, "norm_eps is -1.0"),
        ("llama", {"rope_theta": -1.0}, "the base is -1.0; it is positive"),
        ("llama", {"tie_word_embeddings": "false"}, "'tie_word_embeddings' is 'false'"),  # counted as true
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "8"}}, "factor is '8'"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": [1]}}, "factor is (1,)"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "lack 'long_factor' and 'short_factor'"),
        ("qwen3", {"rope_parameters": {**CONFIGS["qwen3"]["rope_parameters"], "beta_fast": ""}}, "beta_fast is ''"),
        ("qwen3", {"rope_parameters": {**CONFIGS["qwen3"]["rope_parameters"], "rope_theta": True}}, "cannot be used"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": {}}}, "truncate is {}; it is true or false"),
        ("qwen3", {"rope_parameters": {**CONFIGS["qwen3"]["rope_parameters"], "attention_factor": 10**12}}, "amplitude is"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope", "long_factor": "nan", "short_factor": [1, 1, 1]}}, "factors is 'nan'"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "score_scale is"),  # a complex number
        ("granite", {"embedding_multiplier": float("inf")}, "embedding_scale is inf"),
        ("mistral", {"sliding_window": -5}, "a sliding window is -5"),
        ("mistral", {"sliding_window": -(2**63)}, "a sliding window is"),
        ("mistral", {"no_such_key": 1, "nor_this": 2, "vocab_size": 0}, "4 problems"),
    ],
)
def test_configs(kind: str, changes: dict[str, Any], said: str) -> None:
    assert said in _refused(read_config, {**CONFIGS[kind], **changes})


def test_a_window_wider_than_any_text_is_none() -> None:
    assert read_config({**CONFIGS["mistral"], "sliding_window": 2**40})[1].windows is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "not valid JSON"),  # a RecursionError
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'"text"', "a JSON object is expected"),
        (b"", "not valid JSON"),
    ],
)
def test_json_files(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert said in _refused(read_json, tmp_path / "config.json")


def test_a_json_file_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as handle:
        handle.truncate(2**33)
    assert "no such file of a model exceeds" in _refused(read_json, tmp_path / "config.json")


@pytest.mark.parametrize(
    "promised", [[], "x", None, {"a": 3}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": "x.bin"}, {"a": "\0.safetensors"}]
)
def test_an_index_that_is_none(tmp_path: Path, promised: Any) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": promised}))
    assert "weight_map" in _refused(open_folder, folder)


def _with_tensor(folder: Path, name: str, array: np.ndarray) -> str:
    save_file({**load_file(folder / WEIGHTS), name: array}, folder / WEIGHTS)
    return _refused(load, str(folder))


@pytest.mark.parametrize("kind", ["int32", "uint8", "bool", "float8_e4m3fn"])
def test_weights_that_are_no_floats(tmp_path: Path, kind: str) -> None:
    dtype = ml_dtypes.float8_e4m3fn if kind == "float8_e4m3fn" else np.dtype(kind)
    said = _with_tensor(tiny.write_checkpoint(tmp_path / "model"), "model.norm.weight", np.ones(16, dtype))
    assert "tensor model.norm.weight is stored as" in said
    assert "F64, F32, F16, BF16 are read" in said


@pytest.mark.parametrize("values", [(np.inf, -np.inf), (np.nan, 1.0), (1e300, 1.0)])
def test_weights_that_are_not_finite(tmp_path: Path, values: tuple[float, float]) -> None:
    array = np.asarray(values * 8, np.float64)  # 1e300 is finite here, and not in float32
    said = _with_tensor(tiny.write_checkpoint(tmp_path / "model"), "model.norm.weight", array)
    assert "model.norm.weight holds values that are not finite" in said


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", shards=2)
    for shard in sorted(folder.glob("*.safetensors")):
        save_file({**load_file(shard), "model.norm.weight": np.ones(16, np.float32)}, shard)
    first, second = (shard.name for shard in sorted(folder.glob("*.safetensors")))
    assert f"tensor model.norm.weight is in {first} and in {second}" in _refused(open_folder, folder)


def test_damaged_tokenizer_files(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    assert "The tokenizer files in" in _refused(load, str(folder))


EMBEDDING = "token_embd.weight"


@pytest.mark.parametrize(
    ("lies", "said"),
    [
        ({"version": 1}, "its version is 1"),
        ({"version": 0x03000000}, "big-endian"),
        ({"tensors": 2**60}, "tensors announced"),
        ({"keys": 2**63}, "metadata keys announced"),
        ({"length of general.architecture": 2**62}, "a text of 4,611,686,018,427,387,904 bytes"),
        ({"items of tokenizer.ggml.token_type": 2**40}, "array items announced"),
        ({"items of tokenizer.ggml.token_type": 2**40, "item type of tokenizer.ggml.token_type": 0}, "array items announced"),  # a hang
        ({"item type of tokenizer.ggml.token_type": 9}, "a value of unknown type 9"),
        ({"type of llama.block_count": 77}, "a value of unknown type 77"),
        ({"llama.block_count": 2**32 - 1}, "block_count is 4294967295"),
        ({"llama.attention.head_count": 0}, "cannot be used"),
        ({"general.alignment": 33}, "general.alignment is 33"),
        ({f"axes of {EMBEDDING}": 2**31}, "2147483648 axes"),
        ({f"axis 0 of {EMBEDDING}": 0, f"axis 1 of {EMBEDDING}": 2**60}, "has shape [1152921504606846976, 0]"),
        ({f"axis 0 of {EMBEDDING}": 2**40, f"axis 1 of {EMBEDDING}": 2**40}, "ends at byte 4,835,703,278,458,516"),  # 2 ** 80 values
        ({f"type of {EMBEDDING}": 99}, "is of type 99"),
        ({f"type of {EMBEDDING}": 8}, "its rows hold a positive multiple of 32 values"),
        ({f"type of {EMBEDDING}": 26}, "is of type I32, which the gguf package does not decode"),
        ({f"offset of {EMBEDDING}": 2**63}, "ends at byte"),
        ({f"offset of {EMBEDDING}": 4}, "no multiple of 32"),
        ({"offset of output_norm.weight": 0}, f"tensor output_norm.weight overlaps tensor {EMBEDDING}"),
        ({"axis 0 of rope_freqs.weight": 1}, "factors"),
    ],
)
def test_gguf_headers(tmp_path: Path, lies: dict[str, int], said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(damage.gguf_bytes(*tiny_gguf(), lies))
    assert said in _refused(lambda: read_config(open_gguf(tmp_path / "m.gguf").config))


def test_a_gguf_that_holds_things_twice(tmp_path: Path) -> None:
    metadata, tensors = tiny_gguf()
    content = damage.gguf_bytes(metadata, tensors).replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")
    (tmp_path / "m.gguf").write_bytes(content.replace(b"llama.context_length", b"llama.feed_forward_l"))
    (tmp_path / "n.gguf").write_bytes(content.replace(b"general.alignment", b"llama.block_count"))
    assert "tensor blk.0.ffn_up.weight occurs twice" in _refused(open_gguf, tmp_path / "m.gguf")
    assert "metadata key 'llama.block_count' occurs twice" in _refused(open_gguf, tmp_path / "n.gguf")


def test_merges_without_tokens_give_no_tokenizer(tmp_path: Path) -> None:
    """The tokenizers library ends with a panic, which is no Exception, where the result of a merge is no token."""
    metadata, tensors = tiny_gguf()
    for merges in (["! !"], ["!"], ["! ! !"], [""]):
        (tmp_path / "m.gguf").write_bytes(damage.gguf_bytes({**metadata, "tokenizer.ggml.merges": merges}, tensors))
        assert open_gguf(tmp_path / "m.gguf").tokenizer() is None


def test_a_gguf_without_key_value_heads(tmp_path: Path) -> None:
    """They are as many as the heads; once a KeyError."""
    (tmp_path / "m.gguf").write_bytes(damage.gguf_bytes(*tiny_gguf()))
    assert read_config(open_gguf(tmp_path / "m.gguf").config)[1].kv_heads == 2
    assert load(str(tmp_path / "m.gguf")).config.heads == 2


@pytest.mark.parametrize("name", ["/dev/null", "."])
def test_files_that_are_none(name: str) -> None:
    assert "not a readable GGUF file" in _refused(open_gguf, Path(name))
