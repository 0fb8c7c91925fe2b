"""A GGUF file, decoded by the `gguf` package and presented under Hugging Face names and layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.models.checkpoints import Checkpoint

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
INERT = ("rope.dimension_count", "attention.value_length")
INTERLEAVED = ("llama",)
"""Architectures whose query and key rows are stored in interleaved rotary order."""


def open_gguf(file: Path) -> Checkpoint:
    """Opens a GGUF file of any quantisation that the `gguf` package dequantises.

    Raises:
        UserError: not a GGUF file, truncated, or of an architecture or with metadata that is not understood.
    """
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(file)
        fields = {key: field for key, field in reader.fields.items()}
        architecture = str(fields["general.architecture"].contents())
    except Exception as error:  # the package raises many types on damaged files
        raise UserError(f"{file} is not a readable GGUF file ({file.stat().st_size:,} bytes; truncated or damaged?): {error}") from None
    if architecture not in INTERLEAVED:
        raise unknown("GGUF architecture", architecture, INTERLEAVED, "Load the Hugging Face folder of this model instead.")
    tensors = {_huggingface_name(tensor.name, file): tensor for tensor in reader.tensors}
    factors = tensors.pop("rope_freqs", None)
    config = _config(fields, architecture, "lm_head.weight" not in tensors)
    if factors is not None:
        config["rope_scaling"] = {"rope_type": "factors", "factors": tuple(float(x) for x in factors.data)}

    def read(name: str, cut: tuple[slice, ...] | None = None) -> np.ndarray:
        tensor = tensors[name]
        array = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        array = half_split(array, config[heads]) if heads else array
        return array if cut is None else array[cut]

    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    return Checkpoint(config, shapes, read, (file,), lambda: _tokenizer(fields, architecture))


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...] from interleaved rotary order (0, 1 are a pair) to half-split order (0, H / 2 are a pair)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def _huggingface_name(name: str, file: Path) -> str:
    if name in TENSORS:
        return TENSORS[name]
    if name == "rope_freqs.weight":
        return "rope_freqs"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in LAYER_TENSORS:
        return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}.{match[3]}"
    raise unknown(f"tensor in {file}:", name, [*TENSORS, *(f"blk.N.{key}.weight" for key in LAYER_TENSORS)])


def _config(fields: dict[str, Any], architecture: str, tied: bool) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": architecture, "tie_word_embeddings": tied}
    for key, field in fields.items():
        if not key.startswith(architecture + "."):
            continue
        key = key[len(architecture) + 1 :]
        if key in CONFIG:
            config[CONFIG[key]] = field.contents()
        elif key not in INERT:
            raise unknown("GGUF metadata key", f"{architecture}.{key}", CONFIG, "It may change the computation, so the file is refused.")
    config.setdefault("vocab_size", len(fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in fields else None)
    return config


def _tokenizer(fields: dict[str, Any], architecture: str) -> Any:
    """The tokenizer the metadata describes, by transformers' own converter (private there: pinned, and its ids are tested)."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    if "tokenizer.ggml.tokens" not in fields:
        return None

    def content(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else None

    described = {new: content(key) for key, new in GGUF_TOKENIZER_MAPPING["tokenizer"].items() if content(key) is not None}
    backend, _ = convert_gguf_tokenizer(architecture, described)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {token: content(f"ggml.{key}_token_id") for token, key in names.items()}
    special = {token: described["tokens"][index] for token, index in ids.items() if index is not None}
    if not content("ggml.add_bos_token"):
        special.pop("bos_token", None) if not content("chat_template") else None
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=content("chat_template"), **special)
