"""The metadata of a GGUF file as a Hugging Face config: every key is taken by a step that understands it; what is left over is refused.

Names, defaults and derived values as in llama.cpp's conversion scripts and loader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GPT2_SIZES = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
GRANITE_SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
YARN = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
}
LONGROPE = {"original_context_length": "original_max_position_embeddings", "attn_factor": "attention_factor"}
BY_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Keys that may be given layer by layer."""
NEEDED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_gating_func": (0, 1),  # 1: softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
"""Keys that change nothing at these values, where no step has taken them."""
INERT = ("tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")


@dataclass
class Facts:
    """What a file says.

    Attributes:
        rest: metadata of the architecture, without its prefix; steps take from it.
        shapes: shape of every tensor, by its stored name.
        factors: RoPE factors, by the stored name of their tensor without `.weight`.
        config: the Hugging Face config so far.
    """

    rest: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, tuple[float, ...]]
    config: dict[str, Any] = field(default_factory=dict)

    def rename(self, table: Mapping[str, str], needed: bool = True) -> None:
        """Moves keys into the config under their Hugging Face names; KeyError where one is needed and missing."""
        for key, name in table.items():
            if needed or key in self.rest:
                self.config[name] = self.rest.pop(key)


Step = Callable[[Facts], None]


def read_metadata(facts: Facts, steps: tuple[Step, ...]) -> list[str]:
    """Fills `facts.config`; returns what is wrong.

    Raises:
        KeyError, TypeError, ValueError, ArithmeticError: a missing key, or a value that cannot be used.
    """
    for key in BY_LAYER:
        value = facts.rest.get(key)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(f"{key} differs from layer to layer, which is not implemented")
            facts.rest[key] = value[0]
    if not 0 < facts.rest["block_count"] <= len(facts.shapes):
        raise ValueError(f"block_count is {facts.rest['block_count']!r}, with {len(facts.shapes)} tensors in the file")
    facts.config["tie_word_embeddings"] = "output.weight" not in facts.shapes
    facts.config["vocab_size"] = facts.rest.pop("vocab_size", None) or facts.shapes.get("token_embd.weight", (0,))[0]
    for step in steps:
        step(facts)
    for key in INERT:
        facts.rest.pop(key, None)
    return [_problem(key, value) for key, value in facts.rest.items() if not (key in NEEDED and value in NEEDED[key])]


def _problem(key: str, value: Any) -> str:
    if key in NEEDED:
        return f"metadata key {key} is {value!r}; only {NEEDED[key][-1]!r} is implemented"
    return f"metadata key {key} is not understood; it may change the computation"


def named(kind: str, **constants: Any) -> Step:
    """The model type, and values that llama.cpp fixes for the architecture."""
    return lambda facts: facts.config.update(model_type=kind, **constants)


def shape(facts: Facts) -> None:
    """Sizes of a rotary decoder; head width and key/value heads from others where they are not given."""
    facts.rename(SIZES)
    config, rest = facts.config, facts.rest
    config["num_key_value_heads"] = rest.pop("attention.head_count_kv", config["num_attention_heads"])
    config["head_dim"] = rest.pop("attention.key_length", None) or config["hidden_size"] // config["num_attention_heads"]
    if rest.pop("attention.value_length", config["head_dim"]) != config["head_dim"]:
        raise ValueError("keys and values have different widths, which is not implemented")


def gpt2_shape(facts: Facts) -> None:
    facts.rename(GPT2_SIZES)
    if facts.rest.pop("attention.head_count_kv", facts.config["n_head"]) != facts.config["n_head"]:
        raise ValueError("there are fewer key/value heads than heads, which is not implemented for gpt2")


def rope(facts: Facts) -> None:
    """Base, share and scaling of the rotary embedding."""
    config, rest, width = facts.config, facts.rest, facts.config["head_dim"]
    config["rope_theta"] = rest.pop("rope.freq_base", 10_000.0)
    rotated = rest.pop("rope.dimension_count", width)
    if rotated != width:
        config["partial_rotary_factor"] = math.nextafter(rotated / width, 1)  # so that width times it is not below `rotated`
    kind = rest.pop("rope.scaling.type", "linear")
    factor = rest.pop("rope.scaling.factor", None) or rest.pop("rope.scale_linear", None) or 1.0
    values: dict[str, Any] = {}
    if "rope_freqs" in facts.factors:
        kind, values = "factors", {"factors": facts.factors["rope_freqs"]}
    elif "rope_factors_long" in facts.factors:
        kind = "longrope"
        values = {"long_factor": facts.factors["rope_factors_long"], "short_factor": facts.factors["rope_factors_short"]}
        values |= _scaling(rest, LONGROPE)
    elif kind == "yarn":
        values = _scaling(rest, YARN)
    if factor != 1.0:
        values["factor"] = factor
    if kind != "none" and (values or kind != "linear"):
        config["rope_scaling"] = {"rope_type": kind, **values}


def _scaling(rest: dict[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    return {name: rest.pop("rope.scaling." + key) for key, name in table.items() if "rope.scaling." + key in rest}


def two_ropes(local: float | None) -> Step:
    """A second base for layers with a sliding window, `local` where the file gives none (None: the same); scaling is for the others."""

    def step(facts: Facts) -> None:
        config = facts.config
        everywhere = {**config.pop("rope_scaling", {}), "rope_theta": config.pop("rope_theta")}
        base = facts.rest.pop("rope.freq_base_swa", local or everywhere["rope_theta"])
        config["rope_parameters"] = {"full_attention": everywhere, "sliding_attention": {"rope_theta": base}}

    return step


def window(facts: Facts) -> None:
    """One sliding window for all layers; 0 means none."""
    facts.config["sliding_window"] = facts.rest.pop("attention.sliding_window", None) or None


def windows(period: int, size: int = 0) -> Step:
    """Sliding windows in all layers but every `period`-th, where the file does not say in which."""

    def step(facts: Facts) -> None:
        facts.config["sliding_window"] = facts.rest.pop("attention.sliding_window", size) or None
        pattern = facts.rest.pop("attention.sliding_window_pattern", period)
        count = facts.config["num_hidden_layers"]
        slides = pattern if isinstance(pattern, list) else [number % pattern < pattern - 1 for number in range(count)]
        facts.config["layer_types"] = ["sliding_attention" if each else "full_attention" for each in slides]

    return step


def biases(facts: Facts) -> None:
    """Which projections have biases: the tensors tell."""
    for name, tensor in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_gate.bias")):
        if tensor in facts.shapes:
            facts.config[name] = True


def llama_kind(facts: Facts) -> None:
    """Llama, Mistral and Mixtral share an architecture."""
    if facts.rest.get("expert_count"):
        facts.config["model_type"] = "mixtral"
        facts.rename({"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"})
        window(facts)
    elif facts.rest.get("attention.sliding_window"):
        facts.config["model_type"] = "mistral"
        window(facts)
    else:
        facts.config["model_type"] = "llama"


def experts(facts: Facts) -> None:
    table = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
    facts.rename({**table, "expert_feed_forward_length": "moe_intermediate_size"})


def granite_scales(facts: Facts) -> None:
    facts.rename(GRANITE_SCALES, needed=False)
    facts.config.setdefault("attention_multiplier", facts.config["head_dim"] ** -0.5)
    if not facts.rest.pop("rope.scaling.finetuned", True):
        raise ValueError("rope.scaling.finetuned is false, which means no RoPE for granite and is not implemented")


def query_scale(largest: int) -> Step:
    """Gemma's scale of attention scores: not stored; llama.cpp knows the largest model, of `largest` layers, which differs."""

    def step(facts: Facts) -> None:
        config = facts.config
        mean = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = mean if config["num_hidden_layers"] == largest else config["head_dim"]

    return step


def caps(*keys: str) -> Step:
    """Soft caps, which have the same names in both worlds."""
    return lambda facts: facts.rename({key: key for key in keys}, needed=False)


def olmo_windows(facts: Facts) -> None:
    """OLMo 3 is an OLMo 2 with windows."""
    facts.config["model_type"] = "olmo3" if facts.rest.get("attention.sliding_window") else "olmo2"
    if facts.config["model_type"] == "olmo3":
        windows(4)(facts)
        two_ropes(None)(facts)
