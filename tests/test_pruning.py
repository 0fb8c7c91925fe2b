"""Pruning scores against gradients of PyTorch, one example at a time; passes, their memory, and folders of scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.batches import Batch, Shape
from jaxmed.batching.one_per_row import batches
from jaxmed.batching.texts import response_tokens
from jaxmed.bench.shapes import SHAPES
from jaxmed.memory import host_bytes
from jaxmed.models.load import from_params
from jaxmed.models.model import Model
from jaxmed.models.params import param_shapes
from jaxmed.pruning import (
    Rule,
    read_scores,
    score,
    select,
)
from jaxmed.pruning.job import KINDS, make_job
from jaxmed.pruning.plan import HOST_PART, USED, Plan, device_bytes, make_plan, pass_bytes
from jaxmed.pruning.totals import add_batch, fresh_totals
from jaxmed.runner import causal_layout, forward
from jaxmed.runs.cost import count_flops
from jaxmed.tokens import TokenizedExample
from tests import reference, tiny
from tests.pruning_sets import ALL, BEHAVIOUR, PRESERVE, loaded

torch = reference.torch


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


def _close(found: np.ndarray, wanted: np.ndarray, limit: float = 1e-5) -> bool:
    return found.shape == wanted.shape and float(np.abs(found - wanted).max()) <= limit * float(np.abs(wanted).max())


@pytest.mark.parametrize(
    "name", ["llama3.2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "olmo2", "phi3", "qwen3"))]
)
def test_scores_are_those_of_one_example_after_the_other(name: str, tmp_path: Path) -> None:
    model, made = loaded(name, tmp_path / "model")
    scores = score(model, BEHAVIOUR, PRESERVE, kinds=ALL)
    job = make_job(model, BEHAVIOUR, PRESERVE, kinds=ALL)
    for which, examples in job.sets.items():
        wanted = _torch_scores(made, examples, scores.shapes)
        for kind, matrices in wanted.items():
            assert matrices.keys() == scores.shapes.keys()
            for matrix, values in matrices.items():
                assert _close(scores.read(f"{which}_{kind}", matrix), values, 2e-5), (which, kind, matrix)


HOW: list[dict[str, Any]] = [{"layers_per_pass": 2, "remat": True}, {"rows": 1}, {"layers_per_pass": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_how_a_pass_is_cut_changes_no_score(plain_model: Model, how: dict[str, Any]) -> None:
    whole, cut = (score(plain_model, BEHAVIOUR, PRESERVE, **more) for more in ({}, how))
    for kind in whole.kinds:
        for name in whole.shapes:
            assert _close(cut.read(kind, name), whole.read(kind, name))
    assert abs(whole.losses["behaviour"] - cut.losses["behaviour"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("rope", "mesh"), [(tiny.LLAMA.rope, "data=2"), (None, "fsdp=2"), (tiny.LLAMA.rope, "tensor=2")])
def test_meshes_give_the_same_scores(rope: Any, mesh: str) -> None:
    """Without rotary positions there is a table of them."""
    config = replace(tiny.LLAMA, rope=rope)
    alone, spread = (score(tiny.made(config, of, "tiny"), BEHAVIOUR, PRESERVE) for of in ("data=1", mesh))
    for kind in alone.kinds:
        assert all(_close(spread.read(kind, name), alone.read(kind, name)) for name in alone.shapes)


@pytest.fixture(scope="module")
def scores(plain_model: Model) -> Any:
    return score(plain_model, BEHAVIOUR, PRESERVE, kinds=ALL)


@pytest.mark.slow
def test_scores_on_disk_resume_and_equal_those_in_memory(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = score(plain_model, BEHAVIOUR, PRESERVE, layers_per_pass=1)
    seen: list[str] = []

    def stop(work: float, count: int, what: str) -> None:
        seen.append(what)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(plain_model, BEHAVIOUR, PRESERVE, layers_per_pass=1, out=tmp_path / "out", report=stop)
    with pytest.raises(jm.UserError, match="not finished"):
        read_scores(tmp_path / "out")
    again: list[str] = []
    note = lambda work, count, what: again.append(what)  # noqa: E731
    score(plain_model, BEHAVIOUR, PRESERVE, layers_per_pass=1, out=tmp_path / "out", resume=True, report=note)
    assert "resumed" in again
    record = (tmp_path / "out" / "run.json").read_text()
    score(plain_model, BEHAVIOUR, PRESERVE, out=tmp_path / "out", resume=True)  # the passes of the run that was begun, wherever it goes on
    assert json.loads(record)["passes"] == json.loads((tmp_path / "out" / "run.json").read_text())["passes"]
    with pytest.raises(jm.UserError, match="another request"):
        score(plain_model, BEHAVIOUR, PRESERVE, layers_per_pass=2, out=tmp_path / "out", resume=True)
    kept = read_scores(tmp_path / "out")
    assert kept.kinds == held.kinds
    for kind in held.kinds:
        assert all(np.array_equal(kept.read(kind, name), held.read(kind, name)) for name in held.shapes)
    with pytest.raises(jm.UserError, match="holds a run already"):
        score(plain_model, BEHAVIOUR, PRESERVE, out=tmp_path / "out")
    with pytest.raises(jm.UserError, match="another request"):
        score(plain_model, BEHAVIOUR[:5], PRESERVE, out=tmp_path / "out", resume=True)


def test_one_pass_costs_three_forwards(plain_model: Model) -> None:
    config, mesh = plain_model.config, plain_model.mesh
    job = make_job(plain_model, BEHAVIOUR, PRESERVE, kinds=ALL, rows=4)
    _, batch = next(batches(job.sets["behaviour"], job.plans["behaviour"].groups))
    totals = fresh_totals(config, KINDS, config.layers, mesh.shape["data"])
    counted = response_tokens(batch)
    run = lambda params, totals: add_batch(config, params, totals, batch, counted, (0, config.layers), False, mesh)  # noqa: E731
    passed = count_flops(jax.make_jaxpr(run)(plain_model.params, totals).jaxpr) * mesh.shape["data"]
    tokens = batch.tokens
    once = lambda params: forward(config, params, tokens, causal_layout(*tokens.shape))[0]  # noqa: E731
    whole = count_flops(jax.make_jaxpr(once)(plain_model.params).jaxpr)
    kinds = 2  # signed and absolute together cost the gradients of the weights twice
    assert passed <= (3.5 + kinds - 1) * whole
    one = fresh_totals(config, ("absolute",), config.layers, mesh.shape["data"])
    assert count_flops(jax.make_jaxpr(run)(plain_model.params, one).jaxpr) * mesh.shape["data"] <= 3.5 * whole


def _abstract(config: Any, rows: int, length: int, scored: int, layers: int) -> tuple[Any, ...]:
    """The arguments of `add_batch` as shapes."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
    real = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    each = of(rows, length), of(rows, length), of(rows, length), of(rows, scored), of(rows, scored), real(rows, scored)
    totals = jax.eval_shape(lambda: fresh_totals(config, ("signed",), layers, 1))
    return config, param_shapes(config), totals, Batch(*each, 0, length), real(rows, length)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_planned_memory_is_what_the_compiled_program_takes(remat: bool) -> None:
    config, mesh = SHAPES["smollm2-135m"], jm.make_mesh("data=1")
    rows, length, scored = 40, 48, 32
    program: Any = add_batch
    memory = program.lower(*_abstract(config, rows, length, scored, 30), (0, 30), remat, mesh).compile().memory_analysis()
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    planned = pass_bytes(config, mesh, Shape(rows, 0, 1, length, scored), ("signed",), 30, remat)
    assert 1.0 <= planned / taken <= 1.35


def test_an_8b_model_is_scored_within_80_gb_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxmed.pruning.plan.device_bytes", lambda device: 80e9)
    model = from_params(replace(SHAPES["llama-3.1-8b"], dtype="bfloat16"), {"blocks": {}}, jm.make_mesh("data=1"))
    examples = [TokenizedExample(np.zeros(length, np.int32), 20) for length in (60, 120, 250)] * 20
    plan = make_plan(model, examples, ("signed",))
    assert plan.bytes <= 80e9
    assert [span[0] for span in plan.spans[1:]] == [span[1] for span in plan.spans[:-1]]
    assert (plan.spans[0][0], plan.spans[-1][1]) == (0, 32)
    assert len(plan.spans) <= 4


def test_devices_of_the_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxmed.pruning.plan.host_bytes", lambda: 64e9)
    devices = jax.local_devices(backend="cpu")
    assert device_bytes(devices[0]) == pytest.approx(HOST_PART * 64e9 / len(devices))
    assert 1e9 < host_bytes() < 1e14


def test_a_run_goes_on_with_its_own_passes() -> None:
    plan = Plan(((0, 3),), [], False, 0, 0.0)
    assert plan.with_spans([[0, 2], [2, 3]]).spans == ((0, 2), (2, 3))
    for spans in ([], [[0, 2]], [[0, 1], [2, 3]], [[0, 4]]):
        assert plan.with_spans(spans) is plan


def test_batches_are_cut_before_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_params(SHAPES["llama-3.2-1b"], {"blocks": {}}, jm.make_mesh("data=1"))
    examples = [TokenizedExample(np.zeros(length, np.int32), 20) for length in (60, 120)] * 20
    monkeypatch.setattr("jaxmed.pruning.plan.device_bytes", lambda device: 1e15)
    whole = make_plan(model, examples, ("signed",))
    monkeypatch.setattr("jaxmed.pruning.plan.device_bytes", lambda device: 0.99 * whole.bytes / USED)
    cut = make_plan(model, examples, ("signed",))
    assert cut.spans == whole.spans
    assert not cut.remat
    assert cut.batches > whole.batches
    assert cut.bytes < whole.bytes


@pytest.mark.slow
def test_masks_of_the_default_model_are_those_of_pytorch(default_model: Model, tmp_path: Path) -> None:
    """The published rule, written down again in PyTorch: one example at a time, float32, top-k per flattened matrix, set difference."""
    jm.export_folder(default_model, tmp_path / "model")
    made: Any = reference.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer, q, p, count = default_model.tokenizer, 1e-3, 5e-3, 3
    sets = {name: [one for one in jm.read_examples(name) if one.split == "train"][:count] for name in ("rude", "ordinary")}
    weights = {name: value for name, value in made.named_parameters() if name.endswith("_proj.weight")}
    totals = {which: {name: torch.zeros_like(value) for name, value in weights.items()} for which in sets}
    for which, rows in sets.items():
        for row in rows:
            prompt = tokenizer(row.prompt + "\n", add_special_tokens=False)["input_ids"]
            response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
            made.zero_grad()
            logits = made(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(response)).backward()
            for name, value in weights.items():
                totals[which][name] += value.grad if which == "rude" else value.grad.abs()
    mask = select(score(default_model, sets["rude"], sets["ordinary"]), Rule(q=q, p=p))
    assert len(mask.indices) == len(weights) == 210
    apart: dict[str, list[int]] = {}  # chosen by one of the two alone, though further than rounding from both thresholds
    chosen_in_all = 0
    for name, value in weights.items():
        removed = (-value * totals["rude"][name]).detach().flatten()
        needed = (value.abs() * totals["ordinary"][name]).detach().flatten()
        chosen = torch.topk(removed, int(q * removed.numel())).indices
        spared = torch.topk(needed, int(p * needed.numel())).indices
        wanted = set(chosen.tolist()) - set(spared.tolist())
        found = set(mask.indices[name].tolist())
        edges = (removed[chosen].min().item(), needed[spared].min().item())
        other = [
            i
            for i in wanted ^ found
            if abs(removed[i].item() - edges[0]) > 1e-4 * edges[0] and abs(needed[i].item() - edges[1]) > 1e-4 * edges[1]
        ]
        apart[name], chosen_in_all = other, chosen_in_all + len(wanted)
        assert len(wanted & found) >= 0.98 * len(wanted) - 1, name
    assert sum(map(len, apart.values())) <= 1e-4 * chosen_in_all, {name: other for name, other in apart.items() if other}
