"""Damaged checkpoints: the readers give a checkpoint or one UserError; never another exception, a hang, or memory for what is not there."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.checkpoints.gguf_file import open_gguf
from jaxmed.models.checkpoints.huggingface import open_folder, read_json
from jaxmed.models.checkpoints.tensors import check_tensors, needed_rules, under_full_names
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import FAMILIES, read_config
from jaxmed.models.load import load
from jaxmed.models.params import Params, param_shapes
from jaxmed.models.rope import layer_windows
from jaxmed.runner import causal_layout, forward
from tests import damage, tiny

SIZES = {key: value for key, value in tiny.config_json().items() if key not in ("model_type", "rope_theta")}
PLAIN = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 5e5, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"attention_factor": 1.2, "truncate": False}
TWO_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": YARN}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.5], "long_factor": [1.5, 3.0, 8.0], "attention_factor": 1.2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_bias": False},
    "mistral": {**PLAIN, "sliding_window": 12},
    "qwen2": {**PLAIN, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "qwen3": {**SIZES, "rope_parameters": YARN},
    "granite": {**PLAIN, "embedding_multiplier": 6.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 3.0},
    "mixtral": {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**PLAIN, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True},
    "gemma": {**PLAIN, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {**PLAIN, "query_pre_attn_scalar": 24, "sliding_window": 12, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 4.0},
    "gemma3_text": {**SIZES, "query_pre_attn_scalar": 24, "sliding_window": 12, "rope_parameters": TWO_ROPES},
    "olmo2": {**PLAIN, "attention_bias": False},
    "olmo3": {**SIZES, "sliding_window": 12, "layer_types": ["sliding_attention"] * 2 + ["full_attention"], "rope_parameters": TWO_ROPES},
    "phi3": {**SIZES, "partial_rotary_factor": 0.75, "rope_scaling": LONG, "original_max_position_embeddings": 48, "sliding_window": 20},
    "gpt2": {"vocab_size": 264, "n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 4, "layer_norm_epsilon": 1e-5},
}
CONFIGS = {kind: {"model_type": kind, **raw} for kind, raw in CONFIGS.items()}


def tiny_gguf() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a tiny Llama with a tokenizer."""
    sizes = {"block_count": 2, "context_length": 64, "embedding_length": 8, "feed_forward_length": 12, "attention.head_count": 2}
    metadata: dict[str, Any] = {"general.architecture": "llama", "general.alignment": 32}
    metadata |= {f"llama.{key}": value for key, value in sizes.items()}
    metadata |= {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4, "general.languages": ["en"]}
    alphabet = sorted(tiny.tokenizer().get_vocab())[:40]
    metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": alphabet}
    metadata |= {"tokenizer.ggml.token_type": [1] * 40, "tokenizer.ggml.merges": ["! !"], "tokenizer.ggml.bos_token_id": 1}
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, 8), "output_norm.weight": (8,), "rope_freqs.weight": (2,)}
    for layer in range(2):
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{layer}.{name}.weight"] = (8,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}.weight"] = (8, 8)
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (12, 8) for name in ("gate", "up")} | {f"blk.{layer}.ffn_down.weight": (8, 12)}
    return metadata, {name: 1 + 0.1 * rng.random(shape, np.float32) for name, shape in shapes.items()}


SECONDS, MEGABYTES, LETTERS = 4.0, 150, 60_000
"""What one damaged checkpoint may take, and how long its message may be."""
WEIGHTS = "model.safetensors"


def _survives(action: Callable[[], Any]) -> bool:
    """Whether `action` succeeds; a UserError is the only other way out."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    said = None
    try:
        action()
    except jm.UserError as error:
        said = str(error)
    assert said is None or 10 < len(said) < LETTERS
    assert time.process_time() - begun < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024
    return said is None


def _check(checkpoint: Checkpoint) -> None:
    """What `jaxmed.load` does, without JAX: reads the config, checks the tensors, reads them, and builds the tokenizer."""
    family, config = read_config(checkpoint.config)
    checkpoint = under_full_names(checkpoint, family)
    for name, shape in check_tensors(checkpoint, family, needed_rules(family, config), config).items():
        assert checkpoint.read(name).shape == shape
    checkpoint.tokenizer()


def _fuzz(count: int, strategy: st.SearchStrategy[Any], action: Callable[[Any], Any]) -> None:
    """`count` cases: the same ones in every run where they are few, new ones where they are many."""
    healthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(max_examples=count, deadline=None, derandomize=count < 1000, database=None, suppress_health_check=healthy)
    @given(strategy)
    def run(case: Any) -> None:
        _survives(lambda: action(case))

    run()


def _cases(few: int, many: int) -> Any:
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("fuzz") / "model")


@pytest.fixture(scope="module")
def content(folder: Path) -> bytes:
    """The weight file of `folder`, whole."""
    return (folder / WEIGHTS).read_bytes()


def _put(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


@_cases(100, 1500)
def test_safetensors_with_damaged_bytes(folder: Path, content: bytes, count: int) -> None:
    _fuzz(count, damage.byte_damage(2700), lambda change: _check(open_folder(_put(folder / WEIGHTS, change(content)).parent)))


@_cases(150, 1500)
def test_safetensors_with_a_lying_header(folder: Path, content: bytes, count: int) -> None:
    _fuzz(count, damage.header_damage(), lambda change: _check(open_folder(_put(folder / WEIGHTS, change(content)).parent)))


@_cases(100, 2000)
def test_gguf_with_damaged_bytes(tmp_path: Path, count: int) -> None:
    whole = damage.gguf_bytes(*tiny_gguf())
    _fuzz(count, damage.byte_damage(3400), lambda change: _check(open_gguf(_put(tmp_path / "m.gguf", change(whole)))))


@_cases(100, 2000)
def test_gguf_with_a_lying_header(tmp_path: Path, count: int) -> None:
    file = tmp_path / "m.gguf"
    _fuzz(count, damage.LIES, lambda lies: _check(open_gguf(_put(file, damage.gguf_bytes(*tiny_gguf(), lies)))))


@pytest.mark.slow
def test_every_number_of_a_gguf_header_may_lie(tmp_path: Path) -> None:
    for number in range(0, 450, 3):
        for value in (0, 1, 2, 9, 33, 99, *damage.HUGE):
            file = _put(tmp_path / "m.gguf", damage.gguf_bytes(*tiny_gguf(), {number: value}))
            assert _survives(lambda file=file: _check(open_gguf(file))) in (True, False)


def _read_whole(file: Path, raw: Any) -> None:
    file.write_text(json.dumps(raw), encoding="utf-8")
    config = read_config(read_json(file))[1]
    param_shapes(config)
    layer_windows(config)


@pytest.mark.parametrize("kind", CONFIGS)
@_cases(15, 250)
def test_damaged_configs(tmp_path: Path, kind: str, count: int) -> None:
    keys = tuple(CONFIGS[kind])
    _fuzz(count, damage.config_damage(keys), lambda change: _read_whole(tmp_path / "config.json", change(CONFIGS[kind])))


@pytest.mark.parametrize("step", [19, pytest.param(2, marks=pytest.mark.slow)])
def test_every_key_with_every_odd_value(tmp_path: Path, step: int) -> None:
    """Every second in the slow run, every 19th in the quick one."""
    number = 0
    for raw in CONFIGS.values():
        for path in _paths(raw):
            for value in damage.ODD_VALUES:
                number += 1
                if number % step == 0:
                    changed = _with(raw, path, value)
                    _survives(lambda changed=changed: _read_whole(tmp_path / "config.json", changed))


def _paths(raw: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every key, and the keys of every dictionary below."""
    below = [(key, *path) for key, value in raw.items() if isinstance(value, dict) for path in _paths(value)]
    return [*((key,) for key in raw), *below]


def _with(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {**raw, path[0]: _with(raw[path[0]], path[1:], value) if path[1:] else value}


@pytest.mark.slow
def test_configs_that_pass_can_be_traced(tmp_path: Path) -> None:
    """What `read_config` lets through, JAX can build a forward pass of: every eleventh is."""
    passed = 0
    for raw in CONFIGS.values():
        for path in _paths(raw):
            for value in damage.ODD_VALUES:
                try:
                    config = read_config(_with(raw, path, value))[1]
                except jm.UserError:
                    continue
                passed += 1
                if passed % 11 == 0:
                    _trace(config)
    assert passed > 1000


def _trace(config: ModelConfig) -> None:
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        return forward(config, params, tokens, causal_layout(1, 5))[0]

    logits = jax.eval_shape(run, param_shapes(config), jax.ShapeDtypeStruct((1, 5), np.int32))
    assert logits.shape == (1, 5, config.vocabulary)


@_cases(10, 100)
def test_loading_damaged_weights(tmp_path: Path, content: bytes, count: int) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")

    def try_it(change: Callable[[bytes], bytes]) -> None:
        (folder / WEIGHTS).write_bytes(change(content))
        load(str(folder))

    load(str(folder))  # what is compiled once does not count
    _fuzz(count, damage.header_damage() | damage.byte_damage(3000), try_it)


@_cases(10, 100)
def test_loading_a_damaged_gguf(tmp_path: Path, count: int) -> None:
    file = tmp_path / "m.gguf"

    def try_it(lies: dict[int, int]) -> None:
        file.write_bytes(damage.gguf_bytes(*tiny_gguf(), lies))
        load(str(file))

    try_it({})
    _fuzz(count, damage.LIES, try_it)


def test_what_is_not_damaged_passes(folder: Path, content: bytes, tmp_path: Path) -> None:
    _put(folder / WEIGHTS, content)
    assert _survives(lambda: _check(open_folder(folder)))
    assert _survives(lambda: _check(open_gguf(_put(tmp_path / "m.gguf", damage.gguf_bytes(*tiny_gguf())))))
    for raw in CONFIGS.values():
        assert _survives(lambda raw=raw: _read_whole(tmp_path / "config.json", raw))


def test_every_family_is_fuzzed() -> None:
    assert set(CONFIGS) == set(FAMILIES)


def test_the_command_line_says_one_message_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = _put(tmp_path / "m.gguf", damage.gguf_bytes(*tiny_gguf(), {"tensors": 2**63}))
    assert main(["sweep", "--model", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "m.gguf is not a readable GGUF file" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
