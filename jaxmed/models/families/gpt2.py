"""GPT-2: learned positions, layer norms, biases everywhere, one branch in the MLP, matrices stored input by output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmed.models.config import ModelConfig
from jaxmed.models.families.reading import activation
from jaxmed.models.families.table import (
    AS_IS,
    BRANCHES,
    BRANCHES_BIAS,
    OUT,
    QKV_BIAS_IN_ONE,
    QKV_IN_ONE,
    Family,
    Rule,
    Source,
    layer,
    transposed,
)


def read_gpt2(raw: Mapping[str, Any]) -> ModelConfig:
    heads, width = int(raw["n_head"]), int(raw["n_embd"])
    return ModelConfig(
        family="gpt2",
        layers=int(raw["n_layer"]),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        neurons=int(raw.get("n_inner") or 4 * width),
        vocabulary=int(raw["vocab_size"]),
        max_length=int(raw["n_positions"]),
        rope=None,
        norm="layer",
        norm_eps=float(raw["layer_norm_epsilon"]),
        activation=activation(raw["activation_function"]),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=bool(raw["tie_word_embeddings"]),
    )


def _layer(path: str, layout: Any, name: str, *shape: str) -> Rule:
    return layer(path, layout, (name, shape), prefix="transformer.h.{l}.")


def _top(path: str, name: str, *shape: str) -> Rule:
    return Rule((path,), (Source(name, shape),), AS_IS)


RULES = (
    _top("embedding", "transformer.wte.weight", "V", "D"),
    _top("positions", "transformer.wpe.weight", "Q", "D"),
    _top("head", "lm_head.weight", "V", "D"),
    _top("final_norm", "transformer.ln_f.weight", "D"),
    _top("final_norm_bias", "transformer.ln_f.bias", "D"),
    _layer("attention_norm", AS_IS, "ln_1.weight", "D"),
    _layer("attention_norm_bias", AS_IS, "ln_1.bias", "D"),
    _layer("mlp_norm", AS_IS, "ln_2.weight", "D"),
    _layer("mlp_norm_bias", AS_IS, "ln_2.bias", "D"),
    _layer("qkv", transposed(QKV_IN_ONE), "attn.c_attn.weight", "D", "NH+KH+KH"),
    _layer("qkv_bias", QKV_BIAS_IN_ONE, "attn.c_attn.bias", "NH+KH+KH"),
    _layer("out", transposed(OUT), "attn.c_proj.weight", "NH", "D"),
    _layer("out_bias", AS_IS, "attn.c_proj.bias", "D"),
    _layer("gate_up", transposed(BRANCHES), "mlp.c_fc.weight", "D", "F"),
    _layer("gate_up_bias", BRANCHES_BIAS, "mlp.c_fc.bias", "F"),
    _layer("down", AS_IS, "mlp.c_proj.weight", "F", "D"),
    _layer("down_bias", AS_IS, "mlp.c_proj.bias", "D"),
)

GPT2S: dict[str, Family] = {
    "gpt2": Family(
        read_gpt2,
        RULES,
        frozenset(
            ("vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon tie_word_embeddings").split()
        ),
        {
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "reorder_and_upcast_attn": (False, True),
        },
        ("transformer.h.{l}.attn.bias", "transformer.h.{l}.attn.masked_bias"),
        "transformer.",
        inputs_first=True,
    ),
}
