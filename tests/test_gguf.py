"""GGUF files of every architecture against transformers; quantised types against the `gguf` package; what is not understood is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxmed as jm
from jaxmed.generation import stop_tokens
from jaxmed.models.catalog import locate
from jaxmed.models.checkpoints.gguf_file import half_split, open_gguf
from jaxmed.models.checkpoints.gguf_header import read_header
from jaxmed.models.checkpoints.gguf_metadata import Facts, read_metadata
from jaxmed.models.checkpoints.gguf_tables import ARCHITECTURES
from jaxmed.models.families import read_config
from jaxmed.models.load import load
from tests import gguf_export, reference, tiny, tolerances

torch = reference.torch
SCORES = {"query_pre_attn_scalar": 16}  # GGUF files do not hold it: it follows from other sizes
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2-stored": ("Gemma2Config", {**reference.CONFIGS["gemma2"][1], **SCORES}),
    "gemma3-stored": ("Gemma3TextConfig", {**reference.CONFIGS["gemma3"][1], **SCORES}),
    "llama-yarn": ("LlamaConfig", {**reference.SIZES, "rope_parameters": reference.YARN}),
    "qwen3-linear": ("Qwen3Config", {**reference.SIZES, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}),
    "llama-biased": ("LlamaConfig", {**reference.SIZES, "attention_bias": True, "mlp_bias": True}),
    "wide": ("LlamaConfig", {**reference.SIZES, "intermediate_size": 64}),
}
QUICK = {"llama3.1": "llama", "gemma2-stored": "gemma2", "gpt2": "gpt2"}
SLOW = {
    "llama2": "llama",
    "llama3.2": "llama",
    "llama-yarn": "llama",
    "llama-biased": "llama",
    "mistral-unlimited": "llama",
    "mixtral": "llama",
    "qwen2.5": "qwen2",
    "qwen3": "qwen3",
    "qwen3-linear": "qwen3",
    "qwen3-moe": "qwen3moe",
    "gemma": "gemma",
    "gemma3-stored": "gemma3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "phi4-mini": "phi3",
    "granite": "granite",
}
PAIRS = [*QUICK.items(), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW.items())]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Name of a model -> its Hugging Face folder and the model; made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp("saved")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(reference, "CONFIGS", {**reference.CONFIGS, **OTHERS})
                made[name] = folder, reference.save(name, folder)
        return made[name]

    return get


def _logits(file: Path, ids: np.ndarray, **options: Any) -> np.ndarray:
    return np.asarray(jm.forward(load(str(file), **options), ids)[0])


@pytest.mark.parametrize(("name", "architecture"), PAIRS)
def test_logits_equal_transformers(saved: Callable, tmp_path: Path, name: str, architecture: str) -> None:
    folder, made = saved(name)
    file = gguf_export.export(folder, tmp_path / "m.gguf", architecture)
    ids = reference.tokens(90)
    assert np.abs(_logits(file, ids) - reference.logits(made, ids)).max() <= tolerances.TINY_LOGITS


def test_every_architecture_is_covered() -> None:
    assert {*QUICK.values(), *SLOW.values()} == set(ARCHITECTURES)


@pytest.mark.slow
def test_a_window_makes_a_mistral(saved: Callable, tmp_path: Path) -> None:
    folder, made = saved("mistral")
    file = gguf_export.export(folder, tmp_path / "m.gguf", "llama", more={"llama.attention.sliding_window": 12})
    ids = reference.tokens(90)
    assert np.abs(_logits(file, ids) - reference.logits(made, ids)).max() <= tolerances.TINY_LOGITS


@pytest.mark.slow
def test_split_weights_give_the_same_logits(saved: Callable, tmp_path: Path) -> None:
    file = gguf_export.export(saved("mixtral")[0], tmp_path / "m.gguf", "llama")
    found = [_logits(file, reference.tokens(20), mesh=jm.make_mesh(mesh)) for mesh in ("data=1", "tensor=2", "fsdp=2")]
    assert max(np.abs(one - found[0]).max() for one in found) <= tolerances.TINY_LOGITS


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_what_the_package_decodes(saved: Callable, tmp_path: Path, kind: str) -> None:
    folder, _ = saved("wide")
    checkpoint = open_gguf(gguf_export.export(folder, tmp_path / "m.gguf", "llama", kind))
    held = load_file(folder / "model.safetensors")
    assert set(checkpoint.shapes) == set(held)
    heads = {"q_proj": 4, "k_proj": 2}
    for name, array in held.items():
        count = heads.get(name.split(".")[-2])
        stored = gguf_export.permute(array, count) if count else array
        if array.ndim > 1:
            quantised = gguf.GGMLQuantizationType[kind]
            stored = gguf.dequantize(gguf.quantize(stored, quantised), quantised)
        assert np.array_equal(checkpoint.read(name), half_split(stored, count) if count else stored), name


def test_a_q8_0_file_runs_and_stays_near_its_weights(saved: Callable, tmp_path: Path) -> None:
    folder, made = saved("wide")
    file = gguf_export.export(folder, tmp_path / "m.gguf", "llama", "Q8_0")
    checkpoint, ids = open_gguf(file), reference.tokens(40)
    for name, array in load_file(folder / "model.safetensors").items():
        assert np.abs(checkpoint.read(name) - array).max() <= 0.006 * np.abs(array).max()  # half of one of 127 steps, and float16 scales
    exact = reference.logits(made, ids)
    assert 0 < np.abs(_logits(file, ids) - exact).max() <= 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("name", "architecture", "kind"), [("wide", "llama", "Q8_0"), ("gpt2", "gpt2", "F16"), ("mixtral", "llama", "BF16")]
)
def test_slices_are_slices_of_the_whole(saved: Callable, tmp_path: Path, name: str, architecture: str, kind: str) -> None:
    checkpoint = open_gguf(gguf_export.export(saved(name)[0], tmp_path / "m.gguf", architecture, kind))
    rng = np.random.default_rng(0)
    for tensor, shape in checkpoint.shapes.items():
        whole = checkpoint.read(tensor)
        assert whole.shape == shape
        for _ in range(3):
            cut = tuple(slice(*sorted(rng.integers(0, size + 1, 2))) for size in shape)
            assert np.array_equal(checkpoint.read(tensor, cut), whole[cut]), (tensor, cut)


def test_experts_each_in_a_tensor_of_its_own(saved: Callable, tmp_path: Path) -> None:
    def apart(tensors: gguf_export.Tensors) -> gguf_export.Tensors:
        found = {}
        for name, array in tensors.items():
            pieces = enumerate(array) if "_exps" in name else ()
            found |= {name.replace("_exps", f".{number}"): piece for number, piece in pieces} or {name: array}
        return found

    folder, _ = saved("mixtral")
    merged = open_gguf(gguf_export.export(folder, tmp_path / "one.gguf", "llama"))
    single = open_gguf(gguf_export.export(folder, tmp_path / "many.gguf", "llama", touch=apart))
    assert merged.shapes == single.shapes
    assert all(np.array_equal(merged.read(name), single.read(name)) for name in merged.shapes)


def _compare_headers(file: Path) -> None:
    ours, theirs = read_header(file), gguf.GGUFReader(file)
    assert ours.metadata == {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor, stored in zip(theirs.tensors, ours.tensors.values(), strict=True):
        assert (stored.start, stored.size, stored.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert np.array_equal(ours.rows(stored), np.asarray(tensor.data).view(np.uint8))


def test_the_header_is_what_the_package_reads(saved: Callable, tmp_path: Path) -> None:
    more = {"general.languages": ["en", "de"], "general.numbers": [1, -2], "general.floats": [0.5], "general.yes": True}
    _compare_headers(gguf_export.export(saved("mixtral")[0], tmp_path / "m.gguf", "llama", "F16", more=more))


@pytest.mark.slow  # the package takes seconds on a real vocabulary
def test_the_header_of_the_default_model_is_what_the_package_reads() -> None:
    _compare_headers(locate("smollm2-135m-instruct"))


def _metadata(architecture: str, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    rest: dict[str, Any] = {
        "block_count": 6,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 40,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    shapes = {"token_embd.weight": (264, 32), **{f"blk.{number}.ffn_up.weight": (40, 32) for number in range(80)}}
    facts = Facts(rest, shapes, {})
    problems = read_metadata(facts, ARCHITECTURES[architecture].steps)
    return facts.config, problems


SLIDES, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("llama", {}, {"num_key_value_heads": 4, "head_dim": 8, "rope_theta": 1e4, "vocab_size": 264, "tie_word_embeddings": True}),
        ("llama", {"attention__head_count_kv": [2] * 6}, {"num_key_value_heads": 2}),
        ("llama", {"rope__scale_linear": 4.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {"rope_scaling": None}),
        ("llama", {"expert_count": 0, "tensor_data_layout": "Meta AI original pth"}, {"model_type": "llama"}),
        ("phi3", {"rope__dimension_count": 6, "attention__sliding_window": 0}, {"sliding_window": None}),
        ("gemma2", {}, {"query_pre_attn_scalar": 8, "sliding_window": 4096, "layer_types": [SLIDES, FULL] * 3}),
        ("gemma2", {"block_count": 46, "attention__key_length": 128}, {"query_pre_attn_scalar": 8}),
        ("gemma3", {"block_count": 62, "attention__key_length": 128}, {"query_pre_attn_scalar": 8, "sliding_window": None}),
        ("gemma3", {"attention__key_length": 128, "attention__sliding_window": 9}, {"layer_types": [SLIDES] * 5 + [FULL]}),
        (
            "gemma3",
            {"attention__sliding_window": 9, "attention__sliding_window_pattern": [True, False] * 3},
            {"query_pre_attn_scalar": 8, "layer_types": [SLIDES, FULL] * 3},
        ),
        ("olmo2", {"attention__sliding_window": 9}, {"model_type": "olmo3", "layer_types": [SLIDES] * 3 + [FULL] + [SLIDES] * 2}),
        ("granite", {}, {"attention_multiplier": 8**-0.5}),
    ],
)
def test_what_metadata_means(architecture: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config, problems = _metadata(architecture, **changes)
    assert not problems
    assert {key: config.get(key) for key in expected} == expected
    read_config(config)


@pytest.mark.parametrize("heads", [7, 13, 96, 100, 128, 256])
def test_the_rotated_width_survives_the_share(heads: int) -> None:
    for rotated in range(2, heads, 2):
        config, _ = _metadata("llama", attention__key_length=heads, rope__dimension_count=rotated)
        assert int(heads * config["partial_rotary_factor"]) == rotated


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("llama", {"attention__causal": False}, "attention.causal is False"),
        ("llama", {"rope__dimension_sections": [1, 2]}, "rope.dimension_sections is not understood"),
        ("qwen2", {"attention__sliding_window": 9}, "attention.sliding_window is 9"),
        ("qwen3moe", {"expert_gating_func": 2}, "expert_gating_func is 2"),
        ("llama", {"rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not understood"),
    ],
)
def test_metadata_that_may_change_the_computation_is_refused(architecture: str, changes: dict[str, Any], said: str) -> None:
    if architecture == "qwen3moe":
        changes = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 8, **changes}
    assert [problem for problem in _metadata(architecture, **changes)[1] if said in problem]


def _refused(file: Path) -> str:
    with pytest.raises(jm.UserError) as caught:
        load(str(file))
    return str(caught.value)


def test_all_problems_are_said_together(saved: Callable, tmp_path: Path) -> None:
    def touch(tensors: gguf_export.Tensors) -> gguf_export.Tensors:
        return {**tensors, "blk.0.ssm_a.weight": np.ones(3), "blk.00.ffn_up.weight": np.ones((2, 2))}

    more = {"llama.swin_norm": True, "llama.attention.value_length": 9}
    said = _refused(gguf_export.export(saved("llama2")[0], tmp_path / "m.gguf", "llama", touch=touch, more=more))
    for part in ("unknown tensor blk.0.ssm_a.weight", "unknown tensor blk.00.ffn_up.weight", "keys and values have different widths"):
        assert part in said
    assert "swin_norm" in _refused(gguf_export.export(saved("llama2")[0], tmp_path / "n.gguf", "llama", more={"llama.swin_norm": True}))


def test_files_of_other_kinds_are_refused(saved: Callable, tmp_path: Path) -> None:
    folder, _ = saved("llama2")
    gguf_export.write(gguf.GGUFWriter(tmp_path / "a.gguf", "mamba"), {"a": np.ones(2)})
    assert "Unknown GGUF architecture 'mamba'" in _refused(tmp_path / "a.gguf")
    assert "llama-gguf-split" in _refused(gguf_export.export(folder, tmp_path / "b.gguf", "llama", more={"split.count": 3}))
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.int32))
    gguf_export.write(writer, {})
    assert "token_embd.weight is of type I32" in _refused(tmp_path / "c.gguf")


def _with_tokens(saved: Callable, file: Path, pre: str, **entries: int) -> Path:
    tokens = [*sorted(tiny.tokenizer().get_vocab()), *(f"<{number}>" for number in range(7)), "Hi"]
    said = {
        "add_bos_token": True,
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * 256 + [3] * 7 + [1],
        "merges": ["H i"],
        "bos_token_id": 256,
        **entries,
    }
    more = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    return gguf_export.export(saved("qwen2.5")[0], file, "qwen2", more=more)


def test_the_tokenizer_of_another_architecture(saved: Callable, tmp_path: Path) -> None:
    tokenizer = open_gguf(_with_tokens(saved, tmp_path / "m.gguf", "qwen2")).tokenizer()
    ids = tokenizer("Hi <1>ho").input_ids
    assert ids[:2] == [256, 263]
    assert tokenizer.decode(ids) == "<0>Hi <1>ho"


@pytest.mark.parametrize(
    ("ends", "expected"),
    [({"eot": 258}, [257, 258]), ({"eot": 257}, [257]), ({"eot": 258, "eom": 3}, [3, 257, 258]), ({"eos": 2**32 - 1, "eot": 258}, [258])],
)
def test_answers_end_where_the_metadata_says(saved: Callable, tmp_path: Path, ends: dict[str, int], expected: list[int]) -> None:
    model = load(
        str(_with_tokens(saved, tmp_path / "m.gguf", "qwen2", **{f"{end}_token_id": at for end, at in {"eos": 257, **ends}.items()}))
    )
    assert stop_tokens(model) == expected


def test_a_tokenizer_that_is_not_understood_is_missed_only_where_one_is_needed(saved: Callable, tmp_path: Path) -> None:
    model = load(str(_with_tokens(saved, tmp_path / "m.gguf", "a-new-split")))
    assert model.tokenizer is None
    jm.forward(model, np.arange(3))
    with pytest.raises(jm.UserError, match="GGUF file describes a tokenizer that transformers cannot build"):
        jm.sweep(model, tiny.PAIRS)


def test_the_config_of_a_file_is_the_config_of_its_folder(saved: Callable, tmp_path: Path) -> None:
    folder, _ = saved("granite")
    there = read_config(json.loads((folder / "config.json").read_text()))[1]
    here = read_config(open_gguf(gguf_export.export(folder, tmp_path / "m.gguf", "granite")).config)[1]
    for name in ("embedding_scale", "residual_scale", "score_scale", "logit_scale", "norm_eps"):
        assert getattr(here, name) == pytest.approx(getattr(there, name), rel=1e-6)
