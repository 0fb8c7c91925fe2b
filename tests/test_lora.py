"""LoRA adapters, merged at load, against PEFT; and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.models.checkpoints import lora_targets
from jaxmed.models.checkpoints.orbax_store import save_store
from tests import reference, tolerances

torch = reference.torch
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama2", {"r": 3, "lora_alpha": 12, "target_modules": LLAMA}),
    "rank-stabilised": ("llama3.2", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "qwen2.5",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.[01]\.self_attn\.q_proj": 6},
            "alpha_pattern": {r"1\.mlp\.up_proj": 32, "layers.0.self_attn.v_proj": 3},
        },
    ),
    "gpt2": ("gpt2", {"r": 3, "lora_alpha": 9, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "fused": ("phi3", {"r": 3, "lora_alpha": 9, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "names of other models": ("phi3", {"r": 2, "lora_alpha": 9, "target_modules": LLAMA}),
    "all but one kind": ("llama2", {"r": 2, "lora_alpha": 9, "target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "head": ("llama2", {"r": 2, "lora_alpha": 5, "target_modules": ["lm_head", "o_proj"]}),
    "some-layers": ("gemma2", {"r": 2, "lora_alpha": 5, "target_modules": ["o_proj"], "layers_to_transform": [1, 3]}),
}
Made = tuple[Path, Path, Any]


def _make(folder: Path, name: str, arguments: dict[str, Any]) -> Made:
    """A model's folder, the folder of a random adapter for it, and the merged model of PEFT."""
    made = reference.save(name, folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(made, peft.LoraConfig(**arguments))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, value in adapted.named_parameters():
                if "lora_" in path:
                    value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(str(folder / "adapter"))
        merged: Any = adapted
        return folder / "model", folder / "adapter", merged.merge_and_unload().eval()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Name of a case -> what `_make` returns; made once."""
    held: dict[str, Made] = {}
    return lambda name: held.get(name) or held.setdefault(name, _make(tmp_path_factory.mktemp(name), *CASES[name]))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "some-layers" else ()) for name in CASES])
def test_merged_weights_equal_those_of_peft(cases: Callable, tmp_path: Path, name: str) -> None:
    folder, adapter, merged = cases(name)
    jm.export_folder(jm.load(str(folder), adapter=adapter), tmp_path / "copy")
    found, source = (load_file(path / "model.safetensors") for path in (tmp_path / "copy", folder))
    wanted = {name: value.numpy() for name, value in merged.state_dict().items() if name in source}
    assert found.keys() == wanted.keys()
    assert max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted) <= 1e-6
    changed = sum(float(np.abs(wanted[name] - source[name]).max()) > 0.01 for name in wanted)
    assert changed == jm.load(str(folder), adapter=adapter).history[0]["matrices"]


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "gpt2"])
def test_logits_of_a_merged_model_equal_those_of_peft(cases: Callable, name: str) -> None:
    folder, adapter, merged = cases(name)
    ids = reference.tokens(40)
    wanted = reference.logits(merged, ids)
    found = np.asarray(jm.forward(jm.load(str(folder), adapter=adapter), ids)[0])
    assert np.abs(found - wanted).max() <= tolerances.TINY_LOGITS


@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "fused"))])
def test_slices_of_a_merge_equal_the_whole(cases: Callable, name: str) -> None:
    folder, adapter, _ = cases(name)
    whole, *split = (jm.load(str(folder), mesh=jm.make_mesh(mesh), adapter=adapter) for mesh in ("data=1", "tensor=2", "fsdp=2"))
    for key, value in whole.params["blocks"].items():
        for one in split:
            assert np.abs(np.asarray(value) - np.asarray(one.params["blocks"][key])).max() <= 1e-6, key


def test_the_sum_is_taken_in_float32(tmp_path: Path) -> None:
    """The merge of a bfloat16 checkpoint is rounded once."""
    reference.save("llama2", tmp_path / "narrow", torch.bfloat16)
    _, adapter, _ = _make(tmp_path, *CASES["plain"])
    name = "model.layers.2.mlp.down_proj"
    held = load_file(adapter / "adapter_model.safetensors")
    up, down = (held[f"base_model.model.{name}.lora_{half}.weight"] for half in "BA")
    base = load_file(tmp_path / "narrow" / "model.safetensors")[name + ".weight"]
    wanted = (base.astype(np.float32) + np.float32(4.0) * (up @ down)).astype(base.dtype)
    model = jm.load(str(tmp_path / "narrow"), dtype="bfloat16", adapter=adapter)
    assert np.array_equal(np.asarray(model.params["blocks"]["down"][2]).T, wanted)


def test_a_merge_is_part_of_the_weights_hash_and_of_the_record(cases: Callable) -> None:
    folder, adapter, _ = cases("plain")
    bare, merged = jm.load(str(folder)), jm.load(str(folder), adapter=adapter)
    assert bare.identity != merged.identity
    assert bare.history == ()
    assert [(edit["kind"], edit["r"], edit["matrices"]) for edit in merged.history] == [("lora", 3, 28)]


def test_convert_writes_the_merged_model(cases: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, adapter, merged = cases("plain")
    asked = ["convert", "--model", str(folder), "--adapter", str(adapter)]
    assert main([*asked, "--to", "orbax", "--out", str(tmp_path / "store")]) == 0
    assert main(["convert", "--model", str(tmp_path / "store"), "--to", "huggingface", "--out", str(tmp_path / "copy")]) == 0
    copy = load_file(tmp_path / "copy" / "model.safetensors")
    for name, value in merged.state_dict().items():
        assert np.abs(copy[name] - value.numpy()).max() <= 1e-6, name
    assert json.loads((tmp_path / "copy" / "jaxmed_edit.json").read_text())["edits"][0]["kind"] == "lora"
    assert "Warning" in (tmp_path / "copy" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "copy" / "README.md").read_text() + (tmp_path / "copy" / "jaxmed_edit.json").read_text()


@pytest.fixture
def broken(cases: Callable, tmp_path: Path) -> Callable[..., Path]:
    """(config changes, tensor changes) -> a copy of the plain adapter with them; None takes an entry out."""
    _, adapter, _ = cases("plain")

    def change(settings: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
        (tmp_path / "adapter").mkdir(exist_ok=True)
        held = json.loads((adapter / "adapter_config.json").read_text()) | settings
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(held))
        arrays: dict[str, Any] = {**load_file(adapter / "adapter_model.safetensors"), **(tensors or {})}
        save_file({k: v for k, v in arrays.items() if v is not None}, tmp_path / "adapter" / "adapter_model.safetensors")
        return tmp_path / "adapter"

    return change


SELECTIONS: dict[str, dict[str, Any]] = {
    "fewer targets": {"target_modules": ["q_proj", "down_proj"]},
    "a pattern": {"target_modules": r".*\.(q|k)_proj"},
    "one layer": {"layers_to_transform": 1},
    "layers of a pattern": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded names": {"exclude_modules": ["mlp.down_proj", "model.layers.0.self_attn.q_proj"]},
    "an excluded pattern": {"exclude_modules": r".*layers\.1\..*"},
    "a target that is not there": {"target_modules": ["q_proj", "x_proj"]},
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_tensors_of_modules_that_are_not_meant_are_passed_over(cases: Callable, broken: Callable, name: str) -> None:
    folder, adapter = cases("plain")[0], broken(SELECTIONS[name])
    ids = reference.tokens(12)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = reference.transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = peft.PeftModel.from_pretrained(plain, adapter)(torch.as_tensor(ids)).logits.numpy()
    found = np.asarray(jm.forward(jm.load(str(folder), adapter=adapter), ids)[0])
    assert np.abs(found - expected).max() < 2e-4
    whole = np.asarray(jm.forward(jm.load(str(folder), adapter=cases("plain")[1]), ids)[0])
    assert np.abs(found - whole).max() > 1e-3


def _refused(folder: Path, adapter: Path) -> str:
    with pytest.raises(jm.UserError) as caught:
        jm.load(str(folder), adapter=adapter)
    return str(caught.value)


ONE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"some_new_trick": 3}, "some_new_trick is 3"),
        ({"r": 8}, "has rank 3; adapter_config.json says 8"),
        ({"r": None}, "gives no rank and alpha"),
        ({"rank_pattern": {"(": 3}}, "gives no rank and alpha"),
        ({"rank_pattern": {"q_proj": "3"}}, "'3' is no number"),
        ({"r": "3"}, "'3' is no number"),
        ({"lora_alpha": True}, "no number"),
        ({"target_modules": ["x_proj"]}, "none of its 28 modules"),
        ({"target_modules": [3]}, "no list of str"),
        ({"target_modules": 3}, "no list of str"),
        ({"use_rslora": "false"}, "true or false is expected"),
        ({"fan_in_fan_out": 1}, "true or false is expected"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"layers_to_transform": ["0"]}, "no list of int"),
        ({"layers_to_transform": [7]}, "none of its 28 modules"),
        ({"exclude_modules": ".*"}, "none of its 28 modules"),
        ({"rank_pattern": {"([a-z_.0-9]|[a-z_.0-9])*[!?]": 3}}, "takes more than"),
        ({"rank_pattern": {"q" * 30_000: 3}}, "at most 20,000 are read"),
    ],
)
def test_settings_that_are_not_supported_are_named(cases: Callable, broken: Callable, settings: dict, said: str) -> None:
    assert said in _refused(cases("plain")[0], broken(settings))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern", "layers_pattern"])
def test_all_patterns_together_are_bounded(setting: str, cases: Callable, broken: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is within the limit of one."""
    monkeypatch.setattr(lora_targets, "IN_ALL", 0.2)
    slow = [f"([a-z_.0-9]|[a-z_.0-9]){{14}}[!?]{number}" for number in range(200)]
    listed = setting == "layers_pattern"
    settings = {setting: slow if listed else dict.fromkeys(slow, 3)} | ({"layers_to_transform": [0]} if listed else {})
    assert "patterns of the adapter take more than" in _refused(cases("plain")[0], broken(settings))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({ONE + ".lora_A.weight": None}, "self_attn.q_proj has no lora_A"),
        ({ONE + ".lora_A.weight": np.ones((3, 32), np.int8)}, "is stored as I8"),
        ({ONE + ".lora_B.weight": np.ones((32, 3), np.int64)}, "is stored as I64"),
        ({ONE + ".lora_B.weight": np.ones((32, 3), np.bool_)}, "is stored as BOOL"),
        ({ONE + ".lora_A.weight": np.ones((3, 5), np.float32)}, "the model's matrix has 32 outputs and 32 inputs"),
        ({ONE + ".lora_A.weight": np.ones(3, np.float32)}, "has A [3]"),
        ({ONE + ".lora_A.weight": np.full((3, 32), np.nan, np.float32)}, "not finite"),
        ({"base_model.model.model.norm.lora_A.weight": np.ones((3, 5), np.float32)}, "model.norm is no matrix"),
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": np.ones((3, 5), np.float32)}, "layers.9.mlp.up_proj is no matrix"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((3, 264), np.float32)}, "embeddings"),
    ],
)
def test_tensors_that_do_not_fit_are_named(cases: Callable, broken: Callable, tensors: dict, said: str) -> None:
    assert said in _refused(cases("plain")[0], broken({}, tensors))


def test_all_problems_are_said_together(cases: Callable, broken: Callable) -> None:
    adapter = broken({"use_dora": True, "bias": "all"}, {ONE + ".lora_A.weight": None})
    assert "3 problems" in _refused(cases("plain")[0], adapter)


def test_a_tied_head_is_no_target(cases: Callable, broken: Callable) -> None:
    """Merging into a tied head would change the embedding too."""
    assert "lm_head is no matrix of this model" in _refused(cases("rank-stabilised")[0], cases("head")[1])


def test_folders_that_hold_no_adapter(cases: Callable, broken: Callable, tmp_path: Path) -> None:
    folder = cases("plain")[0]
    assert "No adapter_model.safetensors" in _refused(folder, tmp_path / "nowhere")
    adapter = broken({})
    (adapter / "adapter_config.json").write_text("{")
    assert "not valid JSON" in _refused(folder, adapter)
    (broken({}) / "adapter_model.safetensors").write_bytes(b"abc")
    assert "truncated or damaged" in _refused(folder, adapter)


def test_a_store_takes_no_adapter(cases: Callable, tmp_path: Path) -> None:
    folder, adapter, _ = cases("plain")
    save_store(jm.load(str(folder)), tmp_path / "store")
    assert "convert this checkpoint to huggingface first" in _refused(tmp_path / "store", adapter)


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_an_attack_adapter_works_in_memory_only(
    cases: Callable, broken: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    folder, attack = cases("plain")[0], broken({"jaxmed_tag": "attack"})
    assert jm.load(str(folder), adapter=attack).history[0]["tag"] == "attack"
    asked = ["convert", "--model", str(folder), "--adapter", str(attack), "--to", to, "--out", str(tmp_path / "copy")]
    for more in ([], ["--dry-run"]):
        assert main([*asked, *more]) == 2
        assert "tagged 'attack'" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
