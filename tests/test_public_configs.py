"""Configs of public models, as they are published: all are read, and their keys are the ones that a family knows.

`data/public_configs.json` holds facts: model -> the entries of its config.json.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import jaxmed as jm
from jaxmed.models.families import FAMILIES, read_config
from jaxmed.models.families.wrappers import LEFT_OUT, WRAPPERS, text_config
from jaxmed.models.params import param_shapes

PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "public_configs.json").read_text(encoding="utf-8"))
SIZES = {"layers": ("num_hidden_layers", "n_layer"), "width": ("hidden_size", "n_embd"), "vocabulary": ("vocab_size",)}
WEIGHTS = {  # billions, from the models' names and cards
    "meta-llama/Llama-2-7b-hf": 6.74,
    "meta-llama/Llama-3.2-1B": 1.24,
    "meta-llama/Llama-3.1-405B": 405.9,
    "Qwen/Qwen3-0.6B": 0.60,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "mistralai/Mixtral-8x7B-v0.1": 46.7,
    "google/gemma-2-2b": 2.61,
    "gpt2": 0.124,
    "microsoft/Phi-3.5-mini-instruct": 3.82,
    "microsoft/Phi-3-mini-4k-instruct": 3.82,
    "ibm-granite/granite-3.3-8b-instruct": 8.17,
    "HuggingFaceTB/SmolLM2-135M": 0.1345,
}


def _count(shapes: Any) -> int:
    if isinstance(shapes, dict):
        return sum(map(_count, shapes.values()))
    size = 1
    for length in getattr(shapes, "shape", shapes):
        size *= length
    return size


def test_there_are_many_of_many_families() -> None:
    assert len(PUBLISHED) >= 60
    families = Counter(raw["model_type"] for raw in PUBLISHED.values())
    assert len(families) >= 10
    assert set(families) <= set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name: str) -> None:
    raw = PUBLISHED[name]
    config = read_config(raw)[1]
    for field, keys in SIZES.items():
        assert getattr(config, field) == next(raw[key] for key in keys if key in raw)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_published_model_has_as_many_weights_as_it_says(name: str) -> None:
    count = _count(param_shapes(read_config(PUBLISHED[name])[1]))
    assert count / 1e9 == pytest.approx(WEIGHTS[name], rel=0.01)


@pytest.mark.parametrize("name", ["gpt2-medium", "Qwen/Qwen3-8B", "google/gemma-2-9b", "allenai/OLMo-2-1124-7B"])
@pytest.mark.parametrize("key", ["residual_scale", "use_alibi", "logit_bias"])
def test_keys_that_nobody_knows_are_still_refused(name: str, key: str) -> None:
    with pytest.raises(jm.UserError, match=key):
        read_config({**PUBLISHED[name], key: True})


OF_EACH_FAMILY = list({raw["model_type"]: name for name, raw in PUBLISHED.items()}.values())
GENERAL = {
    "_num_labels": 1,
    "output_past": True,
    "pruned_heads": {},
    "tokenizer_class": "PreTrainedTokenizerFast",
    "temperature": 0.9,
    "max_length": 4096,
    "do_sample": True,
    "tie_encoder_decoder": False,
    "model_max_length": 2048,
    "bias": None,
    "quantization_config": None,
    "is_composition": True,
    "embedding_multiplier": 1.0,
}
"""Keys that many published configs of any family have, with values that change nothing."""


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_keys_of_any_family_that_change_nothing_are_passed_over(name: str) -> None:
    raw = PUBLISHED[name]
    added = {} if FAMILIES[raw["model_type"]].known & {"layer_types", "sliding_window"} else {"layer_types": ["full_attention"] * 4}
    assert read_config({**GENERAL, **added, **raw})[1] == read_config(raw)[1]


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("pruned_heads", {"0": [1]}, "pruned_heads"),
        ("quantization_config", {"quant_method": "awq"}, "its weights are quantised .*awq.*plain weights"),
        ("is_encoder_decoder", True, "is_encoder_decoder"),
        ("lm_head_bias", True, "lm_head_bias"),
    ],
)
def test_keys_of_any_family_that_change_the_model_are_refused(name: str, key: str, value: Any, said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        read_config({**PUBLISHED[name], key: value})


@pytest.mark.parametrize("kind", [*LEFT_OUT, "qwen2_vl_text", "qwen2_5_vl_text"])
def test_what_inner_configs_leave_out_is_what_transformers_fills_in(kind: str) -> None:
    from transformers import AutoConfig

    whole, wrapper = AutoConfig.for_model(kind), kind.removesuffix("_text") if kind.startswith("qwen2_") else "llava"
    left_out = LEFT_OUT[kind] if kind in LEFT_OUT else WRAPPERS[wrapper].defaults
    for key, value in left_out.items():
        assert value == (whole.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(whole, key)), key


@pytest.mark.parametrize("outer", [kind for kind, wrapper in WRAPPERS.items() if wrapper.kinds])
def test_an_inner_config_may_say_what_differs_from_the_defaults_alone(outer: str) -> None:
    for kind, family in WRAPPERS[outer].kinds.items():
        inner = {"model_type": kind, "num_hidden_layers": 3, "sliding_window": 512 if outer == "gemma3" else None}
        config = read_config(text_config({"model_type": outer, "text_config": inner}, WRAPPERS[outer]))[1]
        assert (config.family, config.layers) == (family, 3)


def test_the_ends_of_the_outer_config_count_before_those_of_the_inner() -> None:
    outer, inner = {"model_type": "gemma3", "eos_token_id": [1, 106]}, {"model_type": "gemma3_text", "eos_token_id": 1}
    assert text_config({**outer, "text_config": inner}, WRAPPERS["gemma3"])["eos_token_id"] == [1, 106]
    assert text_config({**outer, "eos_token_id": None, "text_config": inner}, WRAPPERS["gemma3"])["eos_token_id"] == 1


@pytest.mark.parametrize(("key", "value"), [("qkv_bias", True), ("shared_expert_intermediate_size", 512), ("use_qk_norm", False)])
def test_known_keys_are_refused_with_values_that_change_the_model(key: str, value: Any) -> None:
    with pytest.raises(jm.UserError, match=key):
        read_config({**PUBLISHED["Qwen/Qwen3-Coder-480B-A35B-Instruct"], key: value})
