"""Tiny random models, a byte-level tokenizer, and pairs for them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxmed.distributed import make_mesh
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.models.checkpoints.tensors import expected_tensors, needed_rules
from jaxmed.models.config import ModelConfig, Rope
from jaxmed.models.families import FAMILIES
from jaxmed.models.load import from_params
from jaxmed.models.model import Model
from jaxmed.models.params import param_shapes, param_shardings
from jaxmed.prompts import PromptPair

LLAMA = ModelConfig("llama", 3, 16, 4, 2, 8, 24, 264, 512, Rope(10000.0), tied=False)
CONFIGS: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "post_norm": replace(LLAMA, pre_norm=False, post_norm=True, query_key_norm="head", tied=True),
    "four_norms": replace(LLAMA, post_norm=True, activation="gelu_tanh"),
    "windowed_biased": replace(LLAMA, windows=(4, 2**30, 9), qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, activation="gelu"),
    "mixture": replace(LLAMA, neurons=32, experts=4, experts_used=2, experts_normed=True),
}
TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
PAIRS = (
    PromptPair("equal", "how to harm", "how to help", ("S", "T"), ("N", "I"), category="x", response="ok then"),
    PromptPair("unequal", "why is it bad", "why is it very nice", ("S",), ("N", "I"), category="y", response="no"),
    PromptPair("short", "do a", "do b", ("S", "U", "V"), ("N",), category="y", response="w"),
)
LONG = tuple(replace(pair, target=("Sure", "To be"), foil=("No", "I am not", "x")) for pair in PAIRS)


def units_of(config: ModelConfig) -> tuple[str, ...]:
    """All kinds of units that a model has."""
    return tuple(unit for unit in MEDIATORS if unit != "up" or config.gated)


@cache
def tokenizer() -> Any:
    """One token per byte, a begin-of-sequence token that the tokenizer itself adds nowhere, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)


def model(name: str, dtype: str = "float32", mesh: str | None = None) -> Model:
    """The tiny model of `CONFIGS[name]`."""
    return made(replace(CONFIGS[name], dtype=dtype), mesh, name)


def made(config: ModelConfig, mesh: str | None, name: str) -> Model:
    """A random model of any config, the same on all meshes."""
    devices = make_mesh(mesh)
    rng = np.random.default_rng(1)

    def draw(path: Any, shape: Any, sharding: Any) -> jax.Array:
        noise = rng.normal(size=shape.shape)
        values = 1 + 0.1 * noise if "norm" in path[-1].key else 0.5 * noise
        return jax.device_put(values.astype(shape.dtype), sharding)

    params = jax.tree.map_with_path(draw, param_shapes(config), param_shardings(config, devices))
    return from_params(config, params, devices, f"tiny {name}", tokenizer())


def config_json(**changes: Any) -> dict[str, Any]:
    """A Hugging Face config of the tiny Llama."""
    raw = {
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return {**raw, **changes}


def write_checkpoint(folder: Path, shards: int = 1, dtype: Any = np.float32, **changes: Any) -> Path:
    """A random tiny Llama as a Hugging Face folder, in one or several safetensors files."""
    raw = config_json(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    family = FAMILIES["llama"]
    config = family.read(raw)
    rng = np.random.default_rng(0)
    names = [pair for rule in needed_rules(family, config) for pair in expected_tensors(rule, config)]
    tensors = {name: (rng.normal(size=shape) * (1.0 if len(shape) == 1 else 0.5)).astype(dtype) for name, shape in names}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
