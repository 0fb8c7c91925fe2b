"""Families as data: one preset (config keys) and one name table (checkpoint tensors) each. Adding a family touches this file only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.models.config import ModelConfig, Rope


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor: its name (`{l}` stands for the layer) and its shape in letters ("NH" is N * H)."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """How checkpoint tensors become one parameter (for block parameters: one layer of it).

    Attributes:
        path: where the parameter sits in the nested dict.
        sources: the tensors it is built from.
        build: (sizes, *tensors) -> the parameter.
        needed: whether a config has this parameter.
    """

    path: tuple[str, ...]
    sources: tuple[Source, ...]
    build: Callable[..., np.ndarray]
    needed: Callable[[ModelConfig], bool] = lambda config: True


@dataclass(frozen=True)
class Family:
    """A preset.

    Attributes:
        read_config: config.json -> ModelConfig.
        known: config keys `read_config` uses.
        rules: the name table.
        ignored: checkpoint tensors that carry nothing.
    """

    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    known: frozenset[str]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()


def _as_is(sizes: Mapping[str, int], tensor: np.ndarray) -> np.ndarray:
    return tensor


def _fuse_qkv(sizes: Mapping[str, int], query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[NH, D] and two [KH, D] -> [K, J, H, D]; for biases [NH] -> [K, J, H]."""
    kv, group, width = sizes["K"], sizes["G"], sizes["H"]
    rest = query.shape[1:]
    parts = [query.reshape(kv, group, width, *rest), key.reshape(kv, 1, width, *rest), value.reshape(kv, 1, width, *rest)]
    return np.concatenate(parts, axis=1)


def _fuse_gate_up(sizes: Mapping[str, int], gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Two [F, D] -> [C, F, D]; for biases [F] -> [C, F]."""
    return np.stack([gate, up])


def _output_projection(sizes: Mapping[str, int], weight: np.ndarray) -> np.ndarray:
    return weight.reshape(sizes["D"], sizes["N"], sizes["H"])


def _transpose(sizes: Mapping[str, int], weight: np.ndarray) -> np.ndarray:
    return weight.T


def _layer(name: str, *shape: str) -> Source:
    return Source("model.layers.{l}." + name, shape)


LLAMA_RULES = (
    Rule(("embedding",), (Source("model.embed_tokens.weight", ("V", "D")),), _as_is),
    Rule(("head",), (Source("lm_head.weight", ("V", "D")),), _as_is, lambda c: not c.tied),
    Rule(("final_norm",), (Source("model.norm.weight", ("D",)),), _as_is),
    Rule(("blocks", "attention_norm"), (_layer("input_layernorm.weight", "D"),), _as_is),
    Rule(("blocks", "mlp_norm"), (_layer("post_attention_layernorm.weight", "D"),), _as_is),
    Rule(
        ("blocks", "qkv"),
        (
            _layer("self_attn.q_proj.weight", "NH", "D"),
            _layer("self_attn.k_proj.weight", "KH", "D"),
            _layer("self_attn.v_proj.weight", "KH", "D"),
        ),
        _fuse_qkv,
    ),
    Rule(
        ("blocks", "qkv_bias"),
        (
            _layer("self_attn.q_proj.bias", "NH"),
            _layer("self_attn.k_proj.bias", "KH"),
            _layer("self_attn.v_proj.bias", "KH"),
        ),
        _fuse_qkv,
        lambda c: c.qkv_bias,
    ),
    Rule(("blocks", "out"), (_layer("self_attn.o_proj.weight", "D", "NH"),), _output_projection),
    Rule(("blocks", "out_bias"), (_layer("self_attn.o_proj.bias", "D"),), _as_is, lambda c: c.out_bias),
    Rule(("blocks", "gate_up"), (_layer("mlp.gate_proj.weight", "F", "D"), _layer("mlp.up_proj.weight", "F", "D")), _fuse_gate_up),
    Rule(
        ("blocks", "gate_up_bias"),
        (_layer("mlp.gate_proj.bias", "F"), _layer("mlp.up_proj.bias", "F")),
        _fuse_gate_up,
        lambda c: c.mlp_bias,
    ),
    Rule(("blocks", "down"), (_layer("mlp.down_proj.weight", "D", "F"),), _transpose),
    Rule(("blocks", "down_bias"), (_layer("mlp.down_proj.bias", "D"),), _as_is, lambda c: c.mlp_bias),
)


def read_rope(raw: Mapping[str, Any], head_width: int) -> Rope:
    """RoPE from either form of the config: `rope_theta` with `rope_scaling`, or `rope_parameters`."""
    fields = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    base = float(fields.pop("rope_theta", raw.get("rope_theta") or 10000.0))
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    names = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low_factor",
            "high_freq_factor": "high_factor",
            "original_max_position_embeddings": "original_length",
        },
        "factors": {"factors": "factors"},
    }
    if kind not in names:
        raise unknown("RoPE type", kind, names)
    for key in fields:
        if key not in names[kind] and key != "partial_rotary_factor":
            raise unknown(f"config key in the RoPE fields of type {kind!r}:", key, names[kind])
    if float(fields.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("The config asks for a partial rotary embedding, which this family does not have.")
    scaling = "none" if kind == "default" else kind
    return Rope(base, scaling, **{names[kind][key]: value for key, value in fields.items()})


ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}


def read_llama_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A Llama-type config.json."""
    heads = int(raw["num_attention_heads"])
    activation = raw.get("hidden_act", "silu")
    if activation not in ACTIVATION_NAMES:
        raise unknown("hidden_act", activation, ACTIVATION_NAMES)
    head_width = int(raw.get("head_dim") or raw["hidden_size"] // heads)
    biased = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family="llama",
        layers=int(raw["num_hidden_layers"]),
        width=int(raw["hidden_size"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_width=head_width,
        neurons=int(raw["intermediate_size"]),
        vocabulary=int(raw["vocab_size"]),
        max_length=int(raw.get("max_position_embeddings", 2048)),
        rope=read_rope(raw, head_width),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATION_NAMES[activation],
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


LLAMA_KEYS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    ]
)

INERT_KEYS = frozenset(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "use_cache",
        "attention_dropout",
        "pretraining_tp",
        "rope_interleaved",
        "is_llama_config",
        "transformers.js_config",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "unsloth_fixed",
        "unsloth_version",
        "torchscript",
    ]
)
"""Config keys that do not change what a forward pass computes."""

INERT_VALUES: dict[str, tuple[Any, ...]] = {"rope_interleaved": (False, None)}
"""Inert keys that are inert at these values only."""

FAMILIES: dict[str, Family] = {
    "llama": Family(read_llama_config, LLAMA_KEYS, LLAMA_RULES, ("model.layers.{l}.self_attn.rotary_emb.inv_freq",)),
}


def read_config(raw: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the config of a checkpoint.

    Raises:
        UserError: unknown model type, a missing key, or a key that might change the computation and is not understood.
    """
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise unknown("model_type", kind, FAMILIES, "This version runs these families.")
    family = FAMILIES[kind]
    for key in sorted(set(raw) - family.known - INERT_KEYS):
        raise unknown(
            f"config key of a {kind} model:", key, sorted(family.known), "It may change the computation, so the model is refused."
        )
    for key, allowed in INERT_VALUES.items():
        if raw.get(key) not in (None, *allowed):
            raise UserError(f"Config key {key!r} is {raw[key]!r}; this family runs only {allowed[0]!r}.")
    try:
        return family, family.read_config(raw)
    except KeyError as missing:
        raise UserError(f"The config lacks {missing}, which a {kind} model needs.") from None
    except (TypeError, ValueError) as wrong:
        raise UserError(f"The config of this {kind} model holds a value that cannot be used: {wrong}.") from None
