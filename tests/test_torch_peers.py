"""The PyTorch side of the benchmark: its peers agree with one another, and its process speaks the protocol."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

from jaxmed.bench import torch_peers  # noqa: E402
from tests.tolerances import EFFECTS  # noqa: E402

SHAPE = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 8, "neurons": 48, "vocabulary": 61}
PAIR = {"base": [1, 5, 9, 13, 2, 7], "source": [1, 6, 11, 3, 2, 7], "target": [4, 8], "foil": [10], "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    fields: dict[str, Any] = {torch_peers.SHAPES[key]: value for key, value in SHAPE.items()}
    config = transformers.LlamaConfig(**fields, tie_word_embeddings=False, initializer_range=0.3)
    path = tmp_path_factory.mktemp("tiny-llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def ready(folder: Path) -> torch_peers.Ready:
    threads = torch.get_num_threads()
    with torch.inference_mode():
        made = torch_peers.set_up({"model": str(folder), **PAIR})
    torch.set_num_threads(threads)
    return made


def effects(ready: torch_peers.Ready, op: str, layer: int, chunk: int) -> Any:
    with torch.inference_mode():
        return torch_peers.PEERS[op][0](ready, layer, 12, chunk)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("op", "chunk"), [("hooks-batch", 5), ("hooks-batch-keep", 5), ("suffix-eager", 5), ("suffix-eager", 12)])
def test_peers_agree_with_one_forward_per_neuron(ready: torch_peers.Ready, op: str, chunk: int, layer: int) -> None:
    single = effects(ready, "hooks-one", layer, 1)
    assert single.abs().max() > 10 * EFFECTS
    torch.testing.assert_close(effects(ready, op, layer, chunk), single, rtol=0, atol=EFFECTS)


def test_patching_nothing_changes_nothing(folder: Path) -> None:
    with torch.inference_mode():
        same = torch_peers.set_up({"model": str(folder), **PAIR, "source": PAIR["base"]})
    assert effects(same, "suffix-eager", 0, 12).abs().max() < EFFECTS


def test_hooks_are_removed(ready: torch_peers.Ready) -> None:
    effects(ready, "hooks-one", 0, 1)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in ready.model.modules())


def talk(*requests: dict[str, Any] | str) -> list[dict[str, Any]]:
    lines = [request if isinstance(request, str) else json.dumps(request) for request in requests]
    command = [sys.executable, "-m", "jaxmed.bench.torch_peers"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_protocol(folder: Path) -> None:
    ask = {"layer": 1, "count": 10}
    ops = ["hooks-one", "hooks-batch", "suffix-eager", "matmuls"]
    setup = {"op": "setup", "model": str(folder), **PAIR}
    early, ready, *measured, unknown, wrong, broken, random, bfloat16 = talk(
        {"op": "hooks-one", **ask},
        setup,
        *({"op": op, **ask} for op in ops),
        {"op": "hook-one", **ask},
        {"op": "hooks-one", "layer": 3},
        "{",
        {**setup, "random": {**SHAPE, "rope_base": 1e5, "tied": True}, "dtype": "bfloat16"},
        {"op": "suffix-eager", **ask, "repeat": 3, "chunk": 4},
        {"op": "quit"},
    )
    assert "setup" in early["error"]
    assert ready["ok"] is True
    assert [answer["op"] for answer in measured] == ops
    assert all(answer["seconds"] > 0 and answer["neurons"] == 10 for answer in measured)
    assert measured[2]["effects"] == pytest.approx(measured[0]["effects"], abs=EFFECTS)
    assert measured[3]["gflops"] > 0
    assert "'hooks-one'" in unknown["error"]
    assert "3 layers" in wrong["error"]
    assert "JSON" in broken["error"]
    assert random["ok"] is True
    assert len(bfloat16["effects"]) == 8


def test_the_process_does_not_import_jax() -> None:
    code = "import sys, jaxmed.bench.torch_peers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
