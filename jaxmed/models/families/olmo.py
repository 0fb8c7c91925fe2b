"""OLMo-2 and OLMo-3: norms after the modules only, query and key norms over all heads together, OLMo-3's windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmed.models.config import ModelConfig
from jaxmed.models.families.reading import COMMON, WINDOWED, decoder, read_rope, windows
from jaxmed.models.families.table import ATTENTION, MLP, PER_HEAD, TOP, Family, norm


def _olmo(raw: Mapping[str, Any]) -> dict[str, Any]:
    biased = bool(raw["attention_bias"])
    return {**decoder(raw), "pre_norm": False, "post_norm": True, "query_key_norm": "all", "qkv_bias": biased, "out_bias": biased}


def read_olmo2(raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**_olmo(raw))


def read_olmo3(raw: Mapping[str, Any]) -> ModelConfig:
    given = raw.get("rope_parameters") or {}
    if "full_attention" in given:
        local, everywhere = given["sliding_attention"], given["full_attention"]
    else:  # the scaling holds for the layers that see all tokens
        theta = {"rope_theta": given.get("rope_theta", raw["rope_theta"])}
        local, everywhere = theta, {**theta, **given, **(raw.get("rope_scaling") or {})}
    plain = {**raw, "rope_parameters": None, "rope_scaling": None}
    slides = windows(raw, lambda number: (number + 1) % 4 != 0)
    ropes = {"rope": read_rope(plain, everywhere), "local_rope": read_rope(plain, local)}
    return ModelConfig(**{**_olmo(plain), **ropes, "windows": slides})


RULES = (
    *TOP,
    *ATTENTION,
    *MLP,
    norm("attention_post_norm", "post_attention_layernorm"),
    norm("mlp_post_norm", "post_feedforward_layernorm"),
    norm("query_norm", "self_attn.q_norm", "NH", PER_HEAD["N"]),
    norm("key_norm", "self_attn.k_norm", "KH", PER_HEAD["K"]),
)
DEFAULTS = {"attention_bias": False, "rms_norm_eps": 1e-5}

OLMOS: dict[str, Family] = {
    "olmo2": Family(read_olmo2, RULES, COMMON | {"attention_bias"}, DEFAULTS),
    "olmo3": Family(
        read_olmo3,
        RULES,
        COMMON | WINDOWED | {"attention_bias"},
        {**DEFAULTS, "sliding_window": 4096, "rope_theta": 5e5},
    ),
}
