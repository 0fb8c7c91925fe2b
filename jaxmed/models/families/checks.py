"""Whether the values of a config can be computed with, before anything is allocated or traced."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from jaxmed.errors import quoted
from jaxmed.models.config import ModelConfig, Rope
from jaxmed.models.families.reading import MOST_LAYERS
from jaxmed.models.rope import frequencies

SWITCHES = frozenset("tie_word_embeddings attention_bias mlp_bias use_sliding_window norm_topk_prob".split())
"""Config keys that are true or false; any other value would count as true."""
COUNTS = frozenset(
    (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings original_max_position_embeddings n_embd n_head n_layer n_positions n_inner num_experts num_local_experts "
        "num_experts_per_tok moe_intermediate_size sliding_window_pattern _sliding_window_pattern"
    ).split()
)
"""Config keys that count something: zero would mean a default to some readers, and text a number."""
POSITIVE = frozenset("attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar rope_theta rope_local_base_freq".split())
NUMBERS = POSITIVE | frozenset(
    (
        "rms_norm_eps layer_norm_epsilon partial_rotary_factor embedding_multiplier residual_multiplier attention_multiplier "
        "logits_scaling sliding_window max_window_layers"
    ).split()
)
MOST = {"layers": MOST_LAYERS + 1, "head_width": 2**16, "experts": 2**14}
"""Sizes that no model exceeds; of the others, 2 ** 31."""
SIZES = ("layers", "width", "heads", "kv_heads", "head_width", "neurons", "vocabulary", "max_length")
LARGEST = 1e30
"""No number of a config comes near; float32 overflows above. JAX takes whole ones below 2 ** 31."""


def wrong_types(raw: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    """Keys of a config.json that a family uses, with values of another kind than theirs."""
    for key in sorted(SWITCHES & set(raw)):
        if not isinstance(raw[key], bool | None):
            yield f"key {key!r} is {quoted(raw[key])}; it is true or false"
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key), Mapping | None):
            yield f"key {key!r} is {quoted(raw[key])}; an object is expected"
    for key in sorted((COUNTS | NUMBERS) & set(raw) & set(known)):
        value, whole = raw[key], key in COUNTS
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST or (whole and value != int(value)):
            yield f"key {key!r} is {quoted(value)}; a finite{' whole' * whole} number is expected"
        elif (whole or key in POSITIVE) and value <= 0:
            yield f"key {key!r} is {quoted(value)}; it is above zero"


def wrong_values(config: ModelConfig) -> list[str]:
    """What is wrong with a config, in words.

    Raises:
        TypeError, ValueError, ArithmeticError: RoPE parameters without frequencies.
    """
    wrong = [*_wrong_sizes(config), *_wrong_numbers(config)]
    for name in ("rope", "local_rope"):
        rope = getattr(config, name)
        if rope is not None and not wrong:
            found = [*_wrong_numbers(rope)] or [*_wrong_rope(rope, config.head_width)]
            wrong = [f"{name}: {problem}" for problem in found]
    return wrong


def _wrong_sizes(config: ModelConfig) -> Iterator[str]:
    for name in SIZES:
        size, most = getattr(config, name), MOST.get(name, 2**31)
        if not 0 < size < most:
            yield f"{name} is {quoted(size)}; sizes are positive and below {most:,}"
    if config.max_length == 1:
        yield "max_length is 1; a model that predicts sees two tokens at least"
    if config.kv_heads > 0 and config.heads % config.kv_heads:
        yield f"{config.heads} query heads do not divide over {config.kv_heads} key/value heads"
    if not 0 <= config.experts < MOST["experts"] or (config.experts and not 0 < config.experts_used <= config.experts):
        yield f"{quoted(config.experts_used)} experts are used per token, of {quoted(config.experts)}"
    if config.windows and min(config.windows) <= 0:
        yield f"a sliding window is {min(config.windows)} tokens wide; it is one at least"
    if config.norm_eps < 0:
        yield f"norm_eps is {config.norm_eps}; it is not negative"


def _wrong_numbers(record: ModelConfig | Rope) -> Iterator[str]:
    """Fields that should hold numbers or truth values, and hold something else, or a number that is not finite."""
    for entry in fields(record):
        value = getattr(record, entry.name)
        if entry.type == "bool" and not isinstance(value, bool):
            yield f"{entry.name} is {quoted(value)}; it is true or false"
        if entry.type in ("str", "bool", "Rope | None") or value is None:
            continue
        several = isinstance(value, tuple) and str(entry.type).startswith("tuple")
        values: Any = value if several else (value,)
        for each in values:
            most = 2**31 if isinstance(each, int) else LARGEST
            if isinstance(each, bool) or not isinstance(each, int | float) or not abs(each) < most:
                yield f"{entry.name} is {quoted(each)}; a finite number is expected"
                break


def _wrong_rope(rope: Rope, head_width: int) -> Iterator[str]:
    if not rope.base > 0:
        yield f"the base is {rope.base}; it is positive"
        return
    rotated: Any = int(head_width * rope.rotary_fraction)
    if rotated % 2 or not 0 < rotated <= head_width:
        yield f"{rotated} dimensions of heads of {head_width} are rotated; they are rotated in pairs"
    elif not 0 < rope.original_length < 2**31:
        yield f"the original length is {quoted(rope.original_length)} tokens"
    else:
        with np.errstate(all="ignore"):
            found = frequencies(rope, head_width)
        if not (np.isfinite(found).all() and (found > 0).all() and all(factor > 0 for factor in rope.short_factors)):
            yield "its frequencies are not finite and positive"
