"""What is measured: a real model on a bundled pair, or random weights of published shapes on random tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from jaxmed.axes import vocabulary_parts
from jaxmed.distributed import make_mesh
from jaxmed.effects.contrast import Contrast, Side
from jaxmed.effects.engine import PreparedContrast, Window, open_window, prepare
from jaxmed.effects.outcomes import Answers, encode_answers
from jaxmed.effects.readout import Readout
from jaxmed.errors import UserError
from jaxmed.models.config import ModelConfig, Rope
from jaxmed.models.families import read_config
from jaxmed.models.load import from_params
from jaxmed.models.model import Model
from jaxmed.models.params import random_params
from jaxmed.prompts import PromptPair, read_pairs
from jaxmed.runs.cost import units_per_device
from jaxmed.tokens import Patch, render

_QWEN = {
    **{"model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2},
    **{"intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True},
    **{"rms_norm_eps": 1e-6, "hidden_act": "silu"},
}
_GEMMA = {
    **{"model_type": "gemma2", "num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4},
    **{"head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000, "max_position_embeddings": 8192, "rope_theta": 1e4},
    **{"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
    **{"rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
}
_LLAMA3 = Rope(500000.0, "llama3", factor=8.0, low_factor=1.0, high_factor=4.0, original_length=8192)
SHAPES: dict[str, ModelConfig] = {
    "qwen2.5-0.5b": read_config(_QWEN)[1],
    "gemma-2-2b": read_config(_GEMMA)[1],
    "smollm2-135m": ModelConfig("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, Rope(100000.0)),
    "llama-3.2-1b": ModelConfig("llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, replace(_LLAMA3, factor=32.0)),
    "llama-3.1-8b": ModelConfig("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, _LLAMA3, tied=False),
    "llama-3.1-70b": ModelConfig("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, _LLAMA3, tied=False),
    "llama-3.1-405b": ModelConfig("llama", 126, 16384, 128, 8, 128, 53248, 128256, 131072, _LLAMA3, tied=False),
}
"""Published shapes: (layers, width, heads, key/value heads, head width, neurons, vocabulary, length)."""


@dataclass(frozen=True)
class Subject:
    """A model and one pair, ready: `base` and `source` are token ids int [T], `answers` the outcome's tokens."""

    model: Model
    base: np.ndarray
    source: np.ndarray
    answers: Answers
    prepared: PreparedContrast
    window: Window
    per_device: int
    readout: Readout


def make_subject(load: Callable[[], Model], shape: str, random_weights: bool, dtype: str, tokens: int) -> Subject:
    """The model and pair to measure; `load` returns the model that is measured without a shape.

    Raises:
        UserError: a shape without `random_weights`, or fewer than two tokens.
    """
    outcomes = ("log-odds",)
    if shape:
        if not random_weights:
            raise UserError(f"--shape {shape} runs on random weights; confirm with --random-weights, or give --model.")
        if tokens < 2:
            raise UserError(f"--tokens {tokens} is too short: at least 2.")
        config, mesh = replace(SHAPES[shape], dtype=dtype), make_mesh()
        model = from_params(config, random_params(config, 0, mesh), mesh, f"random {shape}")
        pair = PromptPair("random", "base", "source")
        base, source = np.random.default_rng(0).integers(0, config.vocabulary, (2, tokens)).astype(np.int32)
        answers = Answers(tuple((i,) for i in range(8)), ((1.0,) * 4 + (-1.0,) * 4,))
    else:
        model, pair = load(), read_pairs("harm")[0]
        base, source = (render(model.tokenizer, pair, side).ids for side in ("base", "source"))
        answers = encode_answers(model.tokenizer, pair, outcomes)
    patch = Patch((len(base) - 1,), (len(source) - 1,))
    prepared = prepare(Contrast(pair, Side(model, base), Side(model, source), (patch,), answers), outcomes, ("neuron",), True)
    size = units_per_device(model.config, model.mesh, model.config.neurons, 1, len(prepared.packed.tokens))
    return Subject(
        model, base, source, answers, prepared, open_window(prepared, patch), size, Readout(outcomes, vocabulary_parts(model.mesh))
    )
