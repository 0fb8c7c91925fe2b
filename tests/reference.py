"""Tiny random models of every family, made by transformers and saved as checkpoints: the oracle of loading and of the forward pass."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

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
        {**SIZES, "head_dim": 16, "moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
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


def _parts(layer: Any) -> dict[str, tuple[Any, bool]]:
    """Site -> (module, whether its input is meant and not its output), for a layer of any family."""
    if hasattr(layer, "ln_1"):
        return {
            "residual_in": (layer.ln_1, True),
            "qkv": (layer.attn.c_attn, False),
            "head_out": (layer.attn.c_proj, True),
            "attention_out": (layer.attn, False),
            "residual_mid": (layer.ln_2, True),
            "neuron": (layer.mlp.c_proj, True),
            "mlp_out": (layer.mlp, False),
            "residual_out": (layer, False),
        }
    attention = layer.self_attn
    found = {"residual_in": (layer, True), "residual_out": (layer, False), "head_out": (attention.o_proj, True)}
    if hasattr(attention, "qkv_proj"):
        found["qkv"] = (attention.qkv_proj, False)
    else:
        found["query"] = (getattr(attention, "q_norm", attention.q_proj), False)
        found["key"] = (getattr(attention, "k_norm", attention.k_proj), False)
        found["value"] = (attention.v_proj, False)
    four = hasattr(layer, "post_feedforward_layernorm")
    found["attention_out"] = (layer.post_attention_layernorm if four else attention.o_proj, False)
    before = getattr(layer, "pre_feedforward_layernorm", layer.mlp if four else layer.post_attention_layernorm)
    found["residual_mid"] = (before, True)
    found["mlp_out"] = (layer.post_feedforward_layernorm if four else layer.mlp, False)
    found["experts" if hasattr(layer.mlp, "experts") else "neuron"] = (getattr(layer.mlp, "down_proj", layer.mlp), True)
    return found


def _all_experts(experts: Any, x: torch.Tensor) -> np.ndarray:
    """Every neuron of every expert, [1, T, X * M], for the mixture's input x [1, T, D]."""
    gate, up = torch.einsum("btd,xcd->btxc", x, experts.gate_up_proj).chunk(2, dim=-1)
    return (experts.act_fn(gate) * up).flatten(2).detach().numpy()


def sites(made: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every named site of a run, [L, B, T, ...] with the heads flattened, read by forward hooks."""
    decoder = made.transformer if hasattr(made, "transformer") else made.model
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    seen: dict[str, list[Any]] = {}

    def keep(name: str, of_input: bool) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if of_input else output
            value = (value[0] if isinstance(value, tuple) else value).detach().clone()
            heads_first = value.ndim == 4 and value.shape[2] == ids.shape[1]  # Gemma 3 norms its heads after moving them there
            seen.setdefault(name, []).append(value.transpose(1, 2) if heads_first else value)

        return hook

    handles = [module.register_forward_hook(keep(name, of_input)) for layer in layers for name, (module, of_input) in _parts(layer).items()]
    with torch.no_grad():
        output = made(torch.as_tensor(ids), output_attentions=True)
    for handle in handles:
        handle.remove()
    seen["attention_pattern"] = list(output.attentions)
    config = made.config
    if "qkv" in seen:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width
        cut = [config.num_attention_heads * width, keys, keys]
        parts = [value.split(cut, dim=-1) for value in seen.pop("qkv")]
        seen |= {name: [part[number] for part in parts] for number, name in enumerate(("query", "key", "value"))}
    if "experts" in seen:
        seen["neuron"] = [_all_experts(layer.mlp.experts, x) for layer, x in zip(layers, seen.pop("experts"), strict=True)]
    for name in ("attention_out", "mlp_out"):
        seen[name] = [value * getattr(config, "residual_multiplier", 1.0) for value in seen[name]]
    stacked = {name: np.stack([np.asarray(value) for value in values]) for name, values in seen.items()}
    return {name: a if name == "attention_pattern" else a.reshape(*a.shape[:3], -1) for name, a in stacked.items()}
