"""Tiny random models of every family, made by transformers and saved as checkpoints: the oracle of loading and of the forward pass."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from jaxmed.parity.torch_reference import run

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 5e5, "beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [1.5, 3.0, 8.0],
    "partial_rotary_factor": 0.75,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 264, "n_positions": 256, "n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama2": ("LlamaConfig", SIZES),
    "llama3.1": ("LlamaConfig", {**SIZES, "rope_parameters": LLAMA3, "head_dim": 8}),
    "llama3.2": ("LlamaConfig", {**SIZES, "rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 12}),
    "mistral-unlimited": ("MistralConfig", {**SIZES, "sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {**SIZES, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen2.5": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2Config",
        {**SIZES, "head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **SIZES,
            "num_hidden_layers": 7,
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3": (
        "Olmo3Config",
        {
            **SIZES,
            "sliding_window": 12,
            "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 5e5}, "full_attention": YARN},
        },
    ),
    "phi3": ("Phi3Config", {**SIZES, "sliding_window": 20}),
    "phi4-mini": (
        "Phi3Config",
        {**SIZES, "original_max_position_embeddings": 48, "rope_parameters": LONG, "tie_word_embeddings": True},
    ),
    "granite": (
        "GraniteConfig",
        {
            **SIZES,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("MixtralConfig", {**SIZES, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**SIZES, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
}
"""Name -> (config class of transformers, its arguments)."""


def model(name: str) -> Any:
    """A random model of a family, in float32 with eager attention; every parameter, norms and biases too, is random."""
    kind, arguments = CONFIGS[name]
    config = getattr(transformers, kind)(**arguments, attn_implementation="eager")
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for path, value in made.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in path or "ln_" in path:
                centre = 0.0 if path.endswith("bias") or "gemma" in name else 1.0
                value.copy_(centre + 0.2 * noise)
            else:
                value.copy_(noise * (0.7 / value.shape[-1] ** 0.5 if value.ndim > 1 and "embed" not in path else 0.3))
    return made


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a family and its checkpoint in `folder`."""
    made = model(name).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return made


def old_form(folder: Path) -> None:
    """Rewrites a saved config to the form of older releases: `rope_theta` and `rope_scaling` instead of `rope_parameters`."""
    raw = json.loads((folder / "config.json").read_text())
    given = raw.pop("rope_parameters")
    if "full_attention" in given:
        raw["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
        given = given["full_attention"]
        if raw["model_type"] == "olmo3":
            raw.pop("rope_local_base_freq")
    raw["rope_theta"] = given.pop("rope_theta")
    share = given.pop("partial_rotary_factor", None)
    if share is not None:
        raw["partial_rotary_factor"] = share
    raw["rope_scaling"] = None if given["rope_type"] == "default" else given
    (folder / "config.json").write_text(json.dumps(raw))


def tokens(count: int, seed: int = 0, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 264, (rows, count))


def logits(made: Any, ids: np.ndarray, **arguments: Any) -> np.ndarray:
    with torch.no_grad():
        return made(torch.as_tensor(ids), **arguments).logits.float().numpy()


def sites(made: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every named site of a run, [L, B, T, ...] with the heads flattened."""
    return run(made, ids)[1]


def bfloat16_paths(narrow: Any, ids: np.ndarray) -> list[np.ndarray]:
    """Logits of a bfloat16 model by eager and by fused attention (eager alone where the family has no fused path)."""
    found = [logits(narrow, ids)]
    try:
        narrow.set_attn_implementation("sdpa")
        found.append(logits(narrow, ids))
    except ValueError:  # soft-capped scores have no fused path
        pass
    narrow.set_attn_implementation("eager")
    return found


def typical_distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square difference of a token's logits, the median over tokens: in a mixture, near-tied routing moves few tokens far."""
    return float(np.median(np.sqrt(((found - wanted) ** 2).mean(-1))))
