"""Gemma 1, 2, and 3 (text): scaled embeddings, norm scales that count from one, soft caps, four norms, alternating windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmed.models.config import ModelConfig
from jaxmed.models.families.reading import COMMON, WINDOWED, activation, decoder, first_given, read_rope, windows
from jaxmed.models.families.table import ATTENTION, FREQUENCIES, HEAD_NORMS, MLP, PRE_NORMS, TOP, Family, norm


def _gemma(raw: Mapping[str, Any]) -> dict[str, Any]:
    named = raw.get("hidden_activation") or raw.get("hidden_act") or "gelu_pytorch_tanh"
    named = "gelu_pytorch_tanh" if named == "gelu" else named  # early releases said gelu and meant its tanh form
    fields = {**decoder({**raw, "hidden_act": "silu"}), "activation": activation(named)}
    return {**fields, "norm_offset": 1.0, "embedding_scale": int(raw["hidden_size"]) ** 0.5, "qkv_bias": bool(raw["attention_bias"])} | {
        "out_bias": bool(raw["attention_bias"])
    }


def _capped(raw: Mapping[str, Any], every: int) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share; every `every`-th layer sees all tokens."""
    return {
        **_gemma(raw),
        "post_norm": True,
        "score_scale": float(raw["query_pre_attn_scalar"]) ** -0.5,
        "score_cap": float(raw["attn_logit_softcapping"] or 0.0),
        "logit_cap": float(raw["final_logit_softcapping"] or 0.0),
        "windows": windows(raw, lambda number: bool((number + 1) % every)),
    }


def read_gemma(raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**_gemma(raw))


def read_gemma2(raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**_capped(raw, every=2))


def read_gemma3(raw: Mapping[str, Any]) -> ModelConfig:
    given = raw.get("rope_parameters") or {}
    if "full_attention" in given:
        local, everywhere = given["sliding_attention"], given["full_attention"]
    else:
        local = {"rope_theta": first_given(raw.get("rope_local_base_freq"), 10_000.0)}
        everywhere = {"rope_theta": first_given(raw.get("rope_theta"), 1e6), **(raw.get("rope_scaling") or {})}
    plain = {**raw, "rope_parameters": None, "rope_scaling": None}
    fields = _capped(plain, every=int(raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6))
    return ModelConfig(**{**fields, "rope": read_rope(plain, everywhere), "local_rope": read_rope(plain, local), "query_key_norm": "head"})


FOUR_NORMS = (
    norm("attention_norm", "input_layernorm"),
    norm("attention_post_norm", "post_attention_layernorm"),
    norm("mlp_norm", "pre_feedforward_layernorm"),
    norm("mlp_post_norm", "post_feedforward_layernorm"),
)
KEYS = COMMON | {"hidden_activation", "attention_bias"}
CAPPED = KEYS | WINDOWED | {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "attention_bias": False}
CAPS = {**DEFAULTS, "query_pre_attn_scalar": 256, "sliding_window": 4096}
ONE_WAY = {"use_bidirectional_attention": (False,)}

GEMMAS: dict[str, Family] = {
    "gemma": Family(read_gemma, (*TOP, *PRE_NORMS, *ATTENTION, *MLP), KEYS, DEFAULTS, ONE_WAY, FREQUENCIES),
    "gemma2": Family(
        read_gemma2,
        (*TOP, *FOUR_NORMS, *ATTENTION, *MLP),
        CAPPED,
        {**CAPS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ONE_WAY,
        FREQUENCIES,
    ),
    "gemma3_text": Family(
        read_gemma3,
        (*TOP, *FOUR_NORMS, *ATTENTION, *HEAD_NORMS, *MLP),
        CAPPED | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
        {**CAPS, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        ONE_WAY,
    ),
}
