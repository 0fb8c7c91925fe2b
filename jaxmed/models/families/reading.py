"""Pieces of config.json that many families share: sizes, RoPE in its old and new forms, sliding windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxmed.errors import UserError, quoted, unknown
from jaxmed.models.config import Rope
from jaxmed.models.rope import UNLIMITED

COMMON = frozenset(
    (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
        "max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor tie_word_embeddings"
    ).split()
)
"""Config keys that `decoder` and `read_rope` use."""

MOST_LAYERS = 2**14
WINDOWED = frozenset(("sliding_window layer_types use_sliding_window max_window_layers").split())
"""Config keys of sliding windows."""

ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}


def activation(name: str) -> str:
    """Our name of an activation; a UserError with the legal names where it is unknown."""
    if name not in ACTIVATION_NAMES:
        raise unknown("hidden_act", name, ACTIVATION_NAMES)
    return ACTIVATION_NAMES[name]


def decoder(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that almost every config.json spells the same way."""
    heads = int(raw["num_attention_heads"])
    head_width = int(raw.get("head_dim") or raw["hidden_size"] // heads)
    return {
        "family": raw["model_type"],
        "layers": int(raw["num_hidden_layers"]),
        "width": int(raw["hidden_size"]),
        "heads": heads,
        "kv_heads": int(raw.get("num_key_value_heads") or heads),
        "head_width": head_width,
        "neurons": int(raw["intermediate_size"]),
        "vocabulary": int(raw["vocab_size"]),
        "max_length": int(raw.get("max_position_embeddings", 2048)),
        "rope": read_rope(raw),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "activation": activation(raw.get("hidden_act", "silu")),
        "tied": bool(raw.get("tie_word_embeddings", False)),
    }


ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_factor",
        "high_freq_factor": "high_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "amplitude",
    },
    "longrope": {
        "factor": "factor",
        "long_factor": "factors",
        "short_factor": "short_factors",
        "original_max_position_embeddings": "original_length",
        "attention_factor": "amplitude",
    },
    "factors": {"factors": "factors", "attention_factor": "amplitude"},
}
"""RoPE type of a config -> its keys -> our names. "factors" is how GGUF files say Llama 3's and LongRoPE's scaling."""


ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": tuple(ROPE_FIELDS["llama3"]),
    "yarn": ("factor",),
    "longrope": ("long_factor", "short_factor"),
}
"""RoPE type -> keys that its fields have, for want of which `transformers` fails."""


def read_rope(raw: Mapping[str, Any], fields: Mapping[str, Any] | None = None) -> Rope:
    """RoPE from either form of the config: `rope_theta` with `rope_scaling`, or `rope_parameters`; or from explicit `fields`.

    Raises:
        UserError: a RoPE type or key that is not implemented.
    """
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})} if fields is None else dict(fields)
    base = float(first_given(given.pop("rope_theta", None), raw.get("rope_theta"), 10000.0))
    share = float(first_given(given.pop("partial_rotary_factor", None), raw.get("partial_rotary_factor"), 1.0))
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ROPE_FIELDS:
        raise unknown("RoPE type", kind, ROPE_FIELDS)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in ROPE_FIELDS[kind]:
            if kind == "default" and not isinstance(value, str):
                continue  # parameters of a scaling that is not asked for
            raise unknown(f"config key in the RoPE fields of type {kind!r}:", key, ROPE_FIELDS[kind])
        if value is not None:
            values[ROPE_FIELDS[kind][key]] = tuple(value) if isinstance(value, (list, tuple)) else value
    if lacking := [key for key in ROPE_NEEDS.get(kind, ()) if given.get(key) is None and fields is None]:
        raise UserError(f"The RoPE fields of type {kind!r} lack {' and '.join(map(repr, lacking))}, which decide the frequencies.")
    if kind in ("yarn", "longrope"):
        _fill(raw, kind, values)
    scaling = {"default": "none", "longrope": "factors"}.get(kind, kind)
    for name in ("factors", "short_factors"):
        rotated = int(int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]) * share)
        if name in values and len(values[name]) != rotated // 2:
            raise UserError(f"The config's RoPE has {len(values[name])} {name}; {rotated // 2} are needed, one per rotated pair.")
    return Rope(base, scaling, share, **values)


def first_given(*values: Any) -> Any:
    """The first value that is given at all: zero is one."""
    return next(value for value in values if value is not None)


def _fill(raw: Mapping[str, Any], kind: str, values: dict[str, Any]) -> None:
    """What YaRN and LongRoPE derive from other keys: the original length, the factor, and the amplitude of cosines and sines."""
    longest = int(raw.get("max_position_embeddings", 2048))
    values.setdefault("original_length", int(raw.get("original_max_position_embeddings") or longest))
    original = values["original_length"]
    values.setdefault("factor", longest / original)
    factor = float(values["factor"])
    if kind == "yarn":
        values.setdefault("amplitude", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    else:
        values.setdefault("amplitude", math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0)


def windows(raw: Mapping[str, Any], slides: Callable[[int], bool]) -> tuple[int, ...] | None:
    """Sliding window of every layer; None where no layer has one. `slides` says which layers slide where `layer_types` is absent."""
    count, size = int(raw["num_hidden_layers"]), raw.get("sliding_window")
    if size is None or raw.get("use_sliding_window") is False:
        return None
    if count > MOST_LAYERS:
        raise UserError(f"The config says {quoted(count)} layers; {MOST_LAYERS:,} are the most that is read.")
    kinds = raw.get("layer_types") or ["sliding_attention" if slides(number) else "full_attention" for number in range(count)]
    if len(kinds) != count:
        raise UserError(f"The config's layer_types has {len(kinds)} entries for {count} layers.")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise unknown("layer type", kind, ("sliding_attention", "full_attention"))
    found = tuple(min(int(size), UNLIMITED) if kind == "sliding_attention" else UNLIMITED for kind in kinds)
    return found if min(found) < UNLIMITED else None
