"""Tiny GGUF files, written with the `gguf` package from Hugging Face checkpoints by the conventions of llama.cpp's conversion scripts.

Independent of the reader under test: names come from `gguf.get_tensor_name_map`, keys from the methods of `gguf.GGUFWriter`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray]


def export(
    folder: Path,
    file: Path,
    architecture: str,
    kind: str = "F32",
    touch: Callable[[Tensors], Tensors] = dict,
    more: dict[str, Any] | None = None,
) -> Path:
    """Writes the checkpoint in `folder` as a GGUF file.

    Args:
        kind: type of the matrices.
        touch: changes the stored tensors before they are written.
        more: further metadata, under its full keys.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    tensors = EXTRA.get(architecture, _no_tensors)(writer, config)
    tensors |= _converted(load_file(folder / "model.safetensors"), config, architecture)
    PARAMETERS.get(architecture, _parameters)(writer, config)
    write(writer, touch(tensors), kind, more)
    return file


def write(writer: gguf.GGUFWriter, tensors: Tensors, kind: str = "F32", more: dict[str, Any] | None = None) -> None:
    """Writes a file, and closes it."""
    for key, value in (more or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, TYPES[type(value)])
    for name, array in tensors.items():
        written = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array, np.float32), written), raw_dtype=written)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows from half-split to interleaved rotary order."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _converted(tensors: Tensors, config: dict[str, Any], architecture: str) -> Tensors:
    layers = config["n_layer" if architecture == "gpt2" else "num_hidden_layers"]
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], layers)
    found: Tensors = {}
    for name, array in _stacked(tensors).items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new, name
        if architecture in ("llama", "granite") and "q_proj" in name:
            array = permute(array, config["num_attention_heads"])
        if architecture in ("llama", "granite") and "k_proj" in name:
            array = permute(array, config["num_key_value_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            array = array.T
        found[new] = array
    return found


def _stacked(tensors: Tensors) -> Tensors:
    """Experts side by side on a new first axis, under the names of the merged tensors."""
    found: Tensors = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if match:
            merged = re.sub(r"model\.(.*)\.block_sparse_moe", r"\1.feed_forward", f"{match[1]}.{match[3]}")  # the converter's own name
            experts.setdefault(merged, {})[int(match[2])] = array
        else:
            found[name] = array
    return {**found, **{name: np.stack([each[number] for number in range(len(each))]) for name, each in experts.items()}}


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    given = config.get("rope_parameters") or {}
    return given.get("full_attention", given)


def _parameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """What `TextModel.set_gguf_parameters` writes."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(0)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if "sliding_attention" in config.get("rope_parameters", {}):
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _llama(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _parameters(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _granite(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _llama(writer, config)
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _qwen3_moe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _parameters(writer, config)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _gemma(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])


def _gemma2(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _gemma(writer, config)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _gemma3(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _parameters(writer, config)
    writer.add_sliding_window(config["sliding_window"])


def _olmo2(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _parameters(writer, config)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _phi3(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rotated = int(_rope(config).get("partial_rotary_factor", 1.0) * config["hidden_size"]) // config["num_attention_heads"]
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_sliding_window(config.get("sliding_window") or 0)


def _gpt2(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _no_tensors(writer: gguf.GGUFWriter, config: dict[str, Any]) -> Tensors:
    return {}


def _rope_freqs(writer: gguf.GGUFWriter, config: dict[str, Any]) -> Tensors:
    """Llama 3's ramp, as factors on the frequencies."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = (rope["original_max_position_embeddings"] / rope[name] for name in ("low_freq_factor", "high_freq_factor"))
    factors = []
    for number in range(0, width, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (number / width)
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        factors.append(1.0 if length < high else rope["factor"] if length > low else 1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.asarray(factors)}


def _long_rope(writer: gguf.GGUFWriter, config: dict[str, Any]) -> Tensors:
    rope, original = _rope(config), config["original_max_position_embeddings"]
    if "long_factor" not in rope:
        return {}
    scale = config["max_position_embeddings"] / original
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    return {f"rope_factors_{kind}.weight": np.asarray(rope[f"{kind}_factor"]) for kind in ("long", "short")}


PARAMETERS: dict[str, Callable[[gguf.GGUFWriter, dict[str, Any]], None]] = {
    "llama": _llama,
    "granite": _granite,
    "qwen3moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
EXTRA: dict[str, Callable[[gguf.GGUFWriter, dict[str, Any]], Tensors]] = {"llama": _rope_freqs, "phi3": _long_rope}
