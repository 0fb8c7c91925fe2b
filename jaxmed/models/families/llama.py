"""Llama 2 to 3.3, Mistral, Qwen2 to 2.5, Qwen3, Granite 3, and the mixtures Mixtral and Qwen3-MoE: one block, small differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmed.models.config import ModelConfig
from jaxmed.models.families.reading import COMMON, WINDOWED, decoder, windows
from jaxmed.models.families.table import (
    ATTENTION,
    EXPERT_BRANCHES,
    EXPERT_DOWN,
    FREQUENCIES,
    HEAD_NORMS,
    MLP,
    PRE_NORMS,
    TOP,
    TRANSPOSED,
    Family,
    layer,
)

RULES = (*TOP, *PRE_NORMS, *ATTENTION, *MLP)


def read_llama(raw: Mapping[str, Any]) -> ModelConfig:
    biased = bool(raw.get("attention_bias", False))
    return ModelConfig(**decoder(raw), qkv_bias=biased, out_bias=biased, mlp_bias=bool(raw.get("mlp_bias", False)))


def llama_json(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config of a Llama without biases, which `read_llama` reads back as `config`; of its RoPE the base alone."""
    assert config.rope is not None
    return {
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.neurons,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.base,
        "tie_word_embeddings": config.tied,
    }


def read_mistral(raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**decoder(raw), windows=windows(raw, lambda number: True))


def read_qwen2(raw: Mapping[str, Any]) -> ModelConfig:
    slides = windows(raw, lambda number: number >= raw["max_window_layers"])
    return ModelConfig(**decoder(raw), qkv_bias=True, windows=slides)


def read_qwen3(raw: Mapping[str, Any]) -> ModelConfig:
    biased, slides = bool(raw["attention_bias"]), windows(raw, lambda number: number >= raw["max_window_layers"])
    return ModelConfig(**decoder(raw), qkv_bias=biased, out_bias=biased, query_key_norm="head", windows=slides)


def read_granite(raw: Mapping[str, Any]) -> ModelConfig:
    biased = bool(raw["attention_bias"])
    return ModelConfig(
        **decoder(raw),
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=bool(raw["mlp_bias"]),
        embedding_scale=float(raw["embedding_multiplier"]),
        residual_scale=float(raw["residual_multiplier"]),
        score_scale=float(raw["attention_multiplier"]),
        logit_scale=1 / float(raw["logits_scaling"]),
    )


def read_mixtral(raw: Mapping[str, Any]) -> ModelConfig:
    experts = int(raw["num_local_experts"])
    shape = {**decoder(raw), "neurons": experts * int(raw["intermediate_size"])}
    mixture = {"experts": experts, "experts_used": int(raw["num_experts_per_tok"]), "experts_normed": True}
    return ModelConfig(**shape, **mixture, windows=windows(raw, lambda number: True))


def read_qwen3_moe(raw: Mapping[str, Any]) -> ModelConfig:
    experts, biased = int(raw.get("num_local_experts") or raw["num_experts"]), bool(raw["attention_bias"])
    shape = {**decoder(raw), "neurons": experts * int(raw["moe_intermediate_size"])}
    mixture = {"experts": experts, "experts_used": int(raw["num_experts_per_tok"]), "experts_normed": bool(raw["norm_topk_prob"])}
    slides = windows(raw, lambda number: True)
    return ModelConfig(**shape, **mixture, qkv_bias=biased, out_bias=biased, query_key_norm="head", windows=slides)


MIXTRAL_MLP = (
    layer("router", TRANSPOSED, ("block_sparse_moe.gate.weight", ("X", "D"))),
    layer(
        "gate_up",
        EXPERT_BRANCHES,
        ("block_sparse_moe.experts.{e}.w1.weight", ("M", "D")),
        ("block_sparse_moe.experts.{e}.w3.weight", ("M", "D")),
    ),
    layer("down", EXPERT_DOWN, ("block_sparse_moe.experts.{e}.w2.weight", ("D", "M"))),
)
QWEN3_MOE_MLP = (
    layer("router", TRANSPOSED, ("mlp.gate.weight", ("X", "D"))),
    layer("gate_up", EXPERT_BRANCHES, ("mlp.experts.{e}.gate_proj.weight", ("M", "D")), ("mlp.experts.{e}.up_proj.weight", ("M", "D"))),
    layer("down", EXPERT_DOWN, ("mlp.experts.{e}.down_proj.weight", ("D", "M"))),
)
QWEN_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "attention_bias": False, "head_dim": None}

LLAMAS: dict[str, Family] = {
    "llama": Family(read_llama, RULES, COMMON | {"attention_bias", "mlp_bias"}, needed={"rope_interleaved": (False,)}, ignored=FREQUENCIES),
    "mistral": Family(read_mistral, RULES, COMMON | WINDOWED, {"sliding_window": 4096, "num_key_value_heads": 8}, ignored=FREQUENCIES),
    "qwen2": Family(read_qwen2, RULES, COMMON | WINDOWED, QWEN_DEFAULTS, {"use_mrope": (False,)}),
    "qwen3": Family(read_qwen3, (*RULES, *HEAD_NORMS), COMMON | WINDOWED | {"attention_bias"}, {**QWEN_DEFAULTS, "head_dim": 128}),
    "granite": Family(
        read_granite,
        RULES,
        COMMON | {"attention_bias", "mlp_bias", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"},
        {
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "mixtral": Family(
        read_mixtral,
        (*TOP, *PRE_NORMS, *ATTENTION, *MIXTRAL_MLP),
        COMMON | WINDOWED | {"num_local_experts", "num_experts_per_tok"},
        {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    ),
    "qwen3_moe": Family(
        read_qwen3_moe,
        (*TOP, *PRE_NORMS, *ATTENTION, *HEAD_NORMS, *QWEN3_MOE_MLP),
        COMMON
        | WINDOWED
        | {"attention_bias", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"},
        {**QWEN_DEFAULTS, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
        {
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([],),
            "qkv_bias": (False,),
            "shared_expert_intermediate_size": (0,),
            "use_qk_norm": (True,),
        },
    ),
}
