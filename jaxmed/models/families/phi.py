"""Phi-3 and Phi-4-mini: fused projections, LongRoPE, partly rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmed.models.config import ModelConfig
from jaxmed.models.families.reading import COMMON, decoder, windows
from jaxmed.models.families.table import ATTENTION, BRANCHES_IN_ONE, MLP, PRE_NORMS, QKV_IN_ONE, TOP, Family, layer


def read_phi3(raw: Mapping[str, Any]) -> ModelConfig:
    scaling = raw.get("rope_scaling")
    if scaling and (scaling.get("rope_type") or scaling.get("type")) == "yarn":  # early releases said yarn and meant LongRoPE
        raw = {**raw, "rope_scaling": {**scaling, "rope_type": "longrope"}}
    return ModelConfig(**decoder(raw), windows=windows(raw, lambda number: True))


PHI4_MINI = {"full_attn_mod": (1,), "lm_head_bias": (False,), "mlp_bias": (False,)}
"""Keys of Phi-4-mini-instruct that say what all models of the family do."""

PHIS: dict[str, Family] = {
    "phi3": Family(
        read_phi3,
        (
            *TOP,
            *PRE_NORMS,
            layer("qkv", QKV_IN_ONE, ("self_attn.qkv_proj.weight", ("NH+KH+KH", "D"))),
            *ATTENTION[2:],
            layer("gate_up", BRANCHES_IN_ONE, ("mlp.gate_up_proj.weight", ("F+F", "D"))),
            *MLP[2:],
        ),
        COMMON | {"sliding_window", "original_max_position_embeddings"},
        {"original_max_position_embeddings": 4096, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        {"attention_bias": (False,), **PHI4_MINI},
    ),
}
