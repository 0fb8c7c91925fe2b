"""What GGUF files of each architecture hold: tensor names, and how their values differ from those of Hugging Face checkpoints.

Names as in `gguf.constants`; differences as made by llama.cpp's conversion scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxmed.models.checkpoints.gguf_metadata import (
    Step,
    biases,
    caps,
    experts,
    gpt2_shape,
    granite_scales,
    llama_kind,
    named,
    olmo_windows,
    query_scale,
    rope,
    shape,
    two_ropes,
    window,
    windows,
)


@dataclass(frozen=True)
class Change:
    """How a stored tensor differs.

    Attributes:
        heads: config key of the number of heads whose rows are in interleaved rotary order; "": none are.
        transposed: stored output by input, where the checkpoint has input by output.
        above: what was added to every value.
    """

    heads: str = ""
    transposed: bool = False
    above: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        names: stored name without `.weight` or `.bias` -> checkpoint name, likewise; "blk." and "{l}" for tensors of every layer;
            "{e}": the experts lie stacked on a first axis, or (stored names with "{e}") each alone.
        steps: how its metadata is read.
        changes: by stored name.
    """

    names: Mapping[str, str]
    steps: tuple[Step, ...]
    changes: Mapping[str, Change] = field(default_factory=dict)


def _block(prefix: str = "model.layers.{l}.", **names: str) -> dict[str, str]:
    return {f"blk.{stored}": prefix + name for stored, name in names.items()}


FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""Tensors that belong to the config."""
IGNORED = ("blk.attn_rot_embd",)
"""Tensors that llama.cpp does not use either."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = _block(attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj", attn_output="self_attn.o_proj")
HEAD_NORMS = _block(attn_q_norm="self_attn.q_norm", attn_k_norm="self_attn.k_norm")
PRE_NORMS = _block(attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
POST_NORMS = _block(post_attention_norm="post_attention_layernorm", post_ffw_norm="post_feedforward_layernorm")
FOUR_NORMS = {**POST_NORMS, **_block(attn_norm="input_layernorm", ffn_norm="pre_feedforward_layernorm")}
MLP = _block(ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
LLAMA = {**TOP, **PRE_NORMS, **ATTENTION, **MLP}
MIXTRAL = {
    **_block(ffn_gate_inp="block_sparse_moe.gate"),
    **_block("model.layers.{l}.block_sparse_moe.experts.{e}.", ffn_gate_exps="w1", ffn_down_exps="w2", ffn_up_exps="w3"),
    **_block("model.layers.{l}.block_sparse_moe.experts.{e}.", **{"ffn_gate.{e}": "w1", "ffn_down.{e}": "w2", "ffn_up.{e}": "w3"}),
}
QWEN_MOE = {
    **_block(ffn_gate_inp="mlp.gate"),
    **_block("model.layers.{l}.mlp.experts.{e}.", ffn_gate_exps="gate_proj", ffn_up_exps="up_proj", ffn_down_exps="down_proj"),
}
FUSED = _block(attn_qkv="self_attn.qkv_proj", attn_output="self_attn.o_proj", ffn_up="mlp.gate_up_proj", ffn_down="mlp.down_proj")
GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    **_block(
        "transformer.h.{l}.",
        attn_norm="ln_1",
        attn_qkv="attn.c_attn",
        attn_output="attn.c_proj",
        ffn_norm="ln_2",
        ffn_up="mlp.c_fc",
        ffn_down="mlp.c_proj",
    ),
}

INTERLEAVED = {"blk.attn_q": Change(heads="num_attention_heads"), "blk.attn_k": Change(heads="num_key_value_heads")}
TRANSPOSED = {f"blk.{name}": Change(transposed=True) for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}
NORMS_ABOVE_ONE = {name: Change(above=1.0) for name in (*TOP, *FOUR_NORMS, *HEAD_NORMS) if name.endswith("norm")}

QWEN = (shape, rope, biases)
GEMMA2_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture({**LLAMA, **MIXTRAL}, (llama_kind, shape, rope, biases), INTERLEAVED),
    "qwen2": Architecture(LLAMA, (named("qwen2"), shape, rope)),
    "qwen3": Architecture({**LLAMA, **HEAD_NORMS}, (named("qwen3"), *QWEN)),
    "qwen3moe": Architecture(
        {**TOP, **PRE_NORMS, **ATTENTION, **HEAD_NORMS, **QWEN_MOE}, (named("qwen3_moe", norm_topk_prob=True), *QWEN, experts)
    ),
    "gemma": Architecture(LLAMA, (named("gemma"), shape, rope), NORMS_ABOVE_ONE),
    "gemma2": Architecture(
        {**TOP, **FOUR_NORMS, **ATTENTION, **MLP},
        (named("gemma2"), shape, rope, windows(2, 4096), query_scale(46), caps(*GEMMA2_CAPS)),
        NORMS_ABOVE_ONE,
    ),
    "gemma3": Architecture(
        {**TOP, **FOUR_NORMS, **ATTENTION, **HEAD_NORMS, **MLP},
        (named("gemma3_text"), shape, rope, two_ropes(1e4), windows(6), query_scale(62), caps("final_logit_softcapping")),
        NORMS_ABOVE_ONE,
    ),
    "olmo2": Architecture({**TOP, **POST_NORMS, **ATTENTION, **HEAD_NORMS, **MLP}, (shape, rope, olmo_windows)),
    "phi3": Architecture({**TOP, **PRE_NORMS, **FUSED}, (named("phi3"), shape, rope, window)),
    "gpt2": Architecture(GPT2, (named("gpt2", activation_function="gelu_new"), gpt2_shape), TRANSPOSED),
    "granite": Architecture(LLAMA, (named("granite"), shape, rope, biases, granite_scales), INTERLEAVED),
}
"""Every architecture that is read, by `general.architecture`."""
