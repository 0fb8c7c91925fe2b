"""Pruning: scores against gradients of PyTorch, one example at a time; masks by every rule; what is edited and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.models.load import Model, load
from jaxmed.pruning import score
from jaxmed.pruning.scores import KINDS, check
from tests import reference, tiny

torch = reference.torch
BEHAVIOUR = [jm.Example(f"ask {i}" + "x" * (5 * i % 13), f"no {'abc'[i % 3] * (i % 4 + 1)}") for i in range(9)]
PRESERVE = [jm.Example(f"tell {i}", f"yes {'de'[i % 2] * (i % 6 + 1)}") for i in range(7)]
ALL = tuple(f"{which}_{kind}" for which in ("behaviour", "preserve") for kind in KINDS)


def _loaded(name: str, folder: Path) -> tuple[Model, Any]:
    made = reference.save(name, folder)
    model = load(str(folder))
    model.tokenizer = tiny.tokenizer()
    return model, made


def _torch_scores(made: Any, examples: list[Any], names: Any) -> dict[str, dict[str, np.ndarray]]:
    """The definitions, one example at a time."""
    weights = {name: value for name, value in made.named_parameters() if name in names}
    signed = {name: torch.zeros_like(value) for name, value in weights.items()}
    absolute = {name: torch.zeros_like(value) for name, value in weights.items()}
    squares: dict[str, Any] = {name: 0.0 for name in weights}
    total, seen = 0, {}
    modules = {name: made.get_submodule(name.removesuffix(".weight")) for name in weights}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].detach()}))
    for one in examples:
        made.zero_grad()
        logits = made(torch.as_tensor(one.ids[None].astype(np.int64))).logits[0, one.prompt - 1 : -1].float()
        target = torch.as_tensor(one.ids[one.prompt :].astype(np.int64))
        torch.nn.functional.cross_entropy(logits, target).backward()
        for name, value in weights.items():
            signed[name] += value.grad
            absolute[name] += value.grad.abs()
            squares[name] = squares[name] + (seen[name][0, one.prompt :] ** 2).sum(0)
        total += len(target)
    return {
        "signed": {name: (value * signed[name]).detach().numpy() for name, value in weights.items()},
        "absolute": {name: (value.abs() * absolute[name]).detach().numpy() for name, value in weights.items()},
        "inputs": {name: np.sqrt(np.asarray(squares[name]) / total) for name in weights},
    }


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and float(np.abs(found - wanted).max()) <= 2e-5 * float(np.abs(wanted).max())


@pytest.mark.parametrize(
    "name", ["llama3.2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "olmo2", "phi3", "qwen3"))]
)
def test_scores_are_those_of_one_example_after_the_other(name: str, tmp_path: Path) -> None:
    model, made = _loaded(name, tmp_path / "model")
    scores = score(model, BEHAVIOUR, PRESERVE, kinds=ALL)
    job = check(model, BEHAVIOUR, PRESERVE, kinds=ALL)
    for which, examples in job.sets.items():
        wanted = _torch_scores(made, examples, scores.shapes)
        for kind, matrices in wanted.items():
            assert matrices.keys() == scores.shapes.keys()
            for matrix, values in matrices.items():
                assert _close(scores.read(f"{which}_{kind}", matrix), values), (which, kind, matrix)


HOW: list[dict[str, Any]] = [{"rows": 1}, {"layers_per_pass": 1}, {"layers_per_pass": 2, "remat": True}]


@pytest.mark.parametrize("how", HOW)
def test_how_a_pass_is_cut_changes_no_score(plain_model: Model, how: dict[str, Any]) -> None:
    whole, cut = (score(plain_model, BEHAVIOUR, PRESERVE, **more) for more in ({}, how))
    for kind in whole.kinds:
        for name in whole.shapes:
            assert _close(cut.read(kind, name), whole.read(kind, name))
    assert abs(whole.losses["behaviour"] - cut.losses["behaviour"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "data=1,model=2"])
def test_meshes_give_the_same_scores(mesh: str) -> None:
    alone, spread = (score(tiny.model("llama", mesh=of), BEHAVIOUR, PRESERVE) for of in ("data=1", mesh))
    for kind in alone.kinds:
        assert all(_close(spread.read(kind, name), alone.read(kind, name)) for name in alone.shapes)
