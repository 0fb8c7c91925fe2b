"""Fine-tuning against independent loops of transformers and peft: losses, gradients, rates, devices."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import peft
import pytest

import jaxmed as jm
from jaxmed.batching.losses import response_loss
from jaxmed.finetuning.feed import Feed
from jaxmed.finetuning.job import Job, make_job, step_flops, total_flops
from jaxmed.finetuning.lora import lay_out, new_factors, save_adapter, with_factors
from jaxmed.finetuning.run import finetune, run_job
from jaxmed.finetuning.settings import Lora, Settings, make_settings
from jaxmed.finetuning.train import learning_rates, make_optimiser, make_step, split_params, start, trained_params
from jaxmed.models.load import load
from jaxmed.models.model import Model
from jaxmed.runs.cost import count_flops
from tests import reference, tiny
from tests.finetuning_sets import EXAMPLES, QUICK

torch = reference.torch


def _loaded(name: str, folder: Path) -> tuple[Model, Any]:
    """A family's tiny model in both runtimes; ours with the byte tokenizer."""
    made = reference.save(name, folder)
    model = load(str(folder))
    model.tokenizer = tiny.tokenizer()
    return model, made


def _torch_losses(job: Job, made: Any) -> list[float]:
    """The same run as a plain loop: one example after the other, token mean over the step, clipping, AdamW."""
    settings = job.settings
    trained = [(name, value) for name, value in made.named_parameters() if value.requires_grad]
    groups = [
        {"params": [v for n, v in trained if v.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [v for n, v in trained if v.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
    rates, losses = learning_rates(settings, job.steps), []
    for step, chosen in enumerate(job.order):
        total, tokens = torch.zeros(()), 0
        for i in chosen:
            one = job.examples[i]
            logits = made(torch.as_tensor(one.ids[None].astype(np.int64))).logits[0, one.prompt - 1 : -1].float()
            target = torch.as_tensor(one.ids[one.prompt :].astype(np.int64))
            total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            tokens += len(target)
        loss = total / tokens
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([value for _, value in trained], settings.clip)
        for group in optimiser.param_groups:
            group["lr"] = float(np.asarray(rates(step)))
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama3.2", {"steps": 6}),
        pytest.param("llama3.2", {"steps": 8, "first_layer": 1}, marks=pytest.mark.slow),
        pytest.param("llama3.2", {"first_layer": 2, "targets": ("q_proj", "up_proj")}, marks=pytest.mark.slow),
        pytest.param("llama3.2", {}, marks=pytest.mark.slow),
        pytest.param(
            "llama3.2",
            {"targets": ("q_proj", "down_proj"), "stabilised": True, "packing": False, "schedule": "cosine"},
            marks=pytest.mark.slow,
        ),
        pytest.param("gpt2", {"accumulate": 2, "first_layer": 1}, marks=pytest.mark.slow),
        pytest.param("phi3", {"remat": True}, marks=pytest.mark.slow),
        pytest.param("gemma2", {}, marks=pytest.mark.slow),
        pytest.param("qwen3", {"targets": ("k_proj", "v_proj", "up_proj")}, marks=pytest.mark.slow),
    ],
)
def test_adapters_follow_a_loop_of_peft(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    model, made = _loaded(name, tmp_path / "model")
    settings = make_settings(**{**QUICK, "steps": 20, "weight_decay": 0.1, **more})
    job = make_job(model, EXAMPLES, (), settings)
    save_adapter(model, new_factors(model.config, settings.lora, settings.seed), settings.lora, tmp_path / "fresh")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(made, str(tmp_path / "fresh"), is_trainable=True)
    tuned = run_job(job)
    wanted = _torch_losses(job, adapted)
    assert np.abs([row["loss"] for row in tuned.losses] - np.asarray(wanted)).max() <= 1e-4
    assert wanted[-1] < wanted[0] - (0.5 if job.steps == 20 else 0.1)
    tuned.save_adapter(tmp_path / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again: Any = peft.PeftModel.from_pretrained(reference.model(name), str(tmp_path / "tuned"))
    ids = reference.tokens(12)
    assert np.abs(reference.logits(again, ids) - np.asarray(jm.forward(tuned.model, ids)[0])).max() <= 2e-5
    merged = jm.load(str(tmp_path / "model"), adapter=tmp_path / "tuned")
    assert np.abs(np.asarray(jm.forward(merged, ids)[0]) - np.asarray(jm.forward(tuned.model, ids)[0])).max() <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3.2", "gpt2", "olmo2"])
def test_full_fine_tuning_follows_a_loop_of_transformers(name: str, tmp_path: Path) -> None:
    model, made = _loaded(name, tmp_path / "model")
    job = make_job(
        model, EXAMPLES, (), make_settings(**{**QUICK, "steps": 20, "method": "full", "weight_decay": 0.1, "learning_rate": 3e-3})
    )
    tuned = run_job(job)
    wanted = _torch_losses(job, made)  # in eval mode: GPT-2 would drop activations
    assert np.abs([row["loss"] for row in tuned.losses] - np.asarray(wanted)).max() <= 1e-4
    jm.export_folder(tuned.model, tmp_path / "out")
    exported = reference.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = reference.tokens(12)
    assert np.abs(reference.logits(exported, ids) - np.asarray(jm.forward(tuned.model, ids)[0])).max() <= 2e-5
    assert json.loads((tmp_path / "out" / "jaxmed_edit.json").read_text())["edits"][0]["kind"] == "fine-tuning"


def _losses(model: Model, **more: Any) -> np.ndarray:
    return np.asarray([row["loss"] for row in finetune(model, EXAMPLES, **{**QUICK, **more}).losses])


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"accumulate": 2},
        {"packing": False},
        {"remat": True},
        {"packing": False, "first_layer": 2},
    ],
)
def test_how_the_work_is_cut_changes_no_loss(plain_model: Model, more: dict[str, Any]) -> None:
    whole = {"first_layer": more.get("first_layer", 0)}
    assert np.abs(_losses(plain_model, **whole) - _losses(plain_model, **more)).max() < 1e-5


@pytest.mark.slow
def test_blocks_below_the_first_adapted_one_run_once_per_example(plain_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(**{**QUICK, "first_layer": 1, "steps": 7})
    job = make_job(plain_model, EXAMPLES, EXAMPLES[:4], settings)
    counted: list[int] = []
    monkeypatch.setattr(Feed, "_through", lambda self, batch, old=Feed._through: counted.append(1) or old(self, batch))
    kept = run_job(job)
    assert job.keeps
    assert len(counted) == 3 + 1  # one epoch, and the held-out batch
    monkeypatch.setattr("jaxmed.finetuning.job.MOST_KEPT", 0)
    assert not job.keeps
    assert np.abs([a["loss"] - b["loss"] for a, b in zip(run_job(job).losses, kept.losses, strict=True)]).max() < 1e-5
    assert len(counted) == 4 + 7 + 1
    layers = plain_model.config.layers
    whole = make_job(plain_model, EXAMPLES, (), replace(settings, first_layer=0))
    assert step_flops(job) < step_flops(whole)
    assert total_flops(whole) > total_flops(job) > (layers - 1) / layers * total_flops(whole)
    for name in ("qkv", "down"):
        changed = np.asarray(kept.model.params["blocks"][name] != plain_model.params["blocks"][name]).reshape(layers, -1).any(1)
        assert changed.tolist() == [False] + [True] * (layers - 1)


def test_remat_runs_the_blocks_again(plain_model: Model) -> None:
    settings = make_settings(**QUICK)
    trained, frozen = split_params(settings, plain_model.params, new_factors(plain_model.config, settings.lora, 0))
    batch = jax.tree.map(lambda leaf: leaf[0], make_job(plain_model, EXAMPLES, (), settings).batch(0))

    def flops(remat: bool) -> float:
        loss = lambda trained: response_loss(  # noqa: E731
            plain_model.config, trained_params(plain_model.config, settings, trained, frozen), batch, remat
        )
        return count_flops(jax.make_jaxpr(jax.grad(loss))(trained).jaxpr)

    assert flops(True) > 1.2 * flops(False)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("constant", [0, 0.5, 1, 1, 1, 1]), ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]), ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447])],
)
def test_learning_rates_rise_and_fall(schedule: Any, wanted: list[float]) -> None:
    rates = learning_rates(Settings(schedule=schedule, warmup=2, learning_rate=0.1), 6)
    assert np.allclose([float(np.asarray(rates(step))) for step in range(6)], 0.1 * np.asarray(wanted), atol=1e-7)


def test_the_heldout_loss_is_that_of_its_examples(plain_model: Model) -> None:
    row = finetune(plain_model, EXAMPLES[:8], EXAMPLES[:8], **{**QUICK, "steps": 1, "warmup": 1}).losses[0]
    assert row["learning_rate"] == 0  # so the parameters of before and after the step are the same
    assert abs(row["loss"] - row["heldout_loss"]) < 1e-6
    assert row["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_meshes_agree(method: str) -> None:
    found = [_losses(tiny.model("llama", mesh=mesh), method=method) for mesh in ("data=1", "data=2", "fsdp=2", "tensor=2")]
    assert np.abs(np.asarray(found) - found[0]).max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "full"])
def test_devices_wait_for_each_other_once_per_step_and_not_in_every_layer(plain_model: Model, method: Any) -> None:
    settings = make_settings(**{**QUICK, "method": method})
    job = make_job(plain_model, EXAMPLES, (), settings)
    optimiser = make_optimiser(settings, job.steps)
    trained, state, frozen, moved = start(plain_model, settings, optimiser)
    step = make_step(plain_model.config, settings, optimiser, plain_model.mesh, moved)
    assert plain_model.mesh.shape["data"] == 2
    program = step.lower(trained, state, frozen, Feed(job).batch(0)).compile().as_text()
    sums = [line for line in program.splitlines() if re.search(r"= .*(all-reduce|reduce-scatter)\(", line)]
    assert sums
    assert not [line for line in sums if "while/body" in line]


def test_moments_are_split_as_their_parameter_and_not_as_another_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned positions have the embedding's shape here; the embedding is split over devices, and they are not."""
    monkeypatch.setitem(tiny.CONFIGS, "learned", replace(tiny.LLAMA, rope=None, max_length=tiny.LLAMA.vocabulary))
    model, settings = tiny.model("learned", mesh="data=1,tensor=2"), make_settings(method="full")
    trained, state, _, _ = start(model, settings, make_optimiser(settings, 4))
    assert trained["positions"].shape == trained["embedding"].shape
    assert trained["positions"].sharding.is_fully_replicated != trained["embedding"].sharding.is_fully_replicated
    for name in ("mu", "nu"):
        moments = optax.tree.get(state, name)
        alike = jax.tree.map(lambda own, leaf: own.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), moments, trained)
        assert all(jax.tree.leaves(alike))
    assert optax.tree.get_all_with_path(state, "count")[0][1].sharding.is_fully_replicated


@pytest.mark.slow
def test_bfloat16_follows_float32(plain_model: Model) -> None:
    narrow = tiny.model("llama", "bfloat16")
    tuned = finetune(narrow, EXAMPLES, **{**QUICK, "method": "full"})
    assert np.abs(np.asarray([row["loss"] for row in tuned.losses]) - _losses(plain_model, method="full")).max() < 0.1
    assert tuned.model.params["blocks"]["down"].dtype == jax.numpy.bfloat16


def test_nothing_is_kept_for_frozen_weights(plain_model: Model) -> None:
    config, settings = plain_model.config, make_settings(**{**QUICK, "rank": 1})
    factors = new_factors(config, settings.lora, 0)
    trained, frozen = split_params(settings, plain_model.params, factors)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trained))
    state = jax.eval_shape(make_optimiser(settings, 4).init, trained)
    assert numbers == sum(layers * (inputs + outputs) for layers, inputs, outputs in _matrices(plain_model))
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * numbers
    assert frozen is plain_model.params
    batch = jax.tree.map(lambda leaf: leaf[0], make_job(plain_model, EXAMPLES, (), settings).batch(0))

    def loss(trained: Any, frozen: Any) -> jax.Array:
        return response_loss(config, trained_params(config, settings, trained, frozen), batch)

    ours, everything = (count_flops(jax.make_jaxpr(jax.grad(loss, argnums))(trained, frozen).jaxpr) for argnums in (0, (0, 1)))
    weights = 2 * batch.tokens.size * config.layers * config.layer_weights
    assert everything - ours >= weights  # what gradients of the frozen matrices would cost is not spent


def _matrices(model: Model) -> list[tuple[int, int, int]]:
    s = model.config.sizes
    queries, keys = s["N"] * s["H"], s["K"] * s["H"]
    sides = [(s["D"], queries), (s["D"], keys), (s["D"], keys), (queries, s["D"]), (s["D"], s["F"]), (s["D"], s["F"]), (s["F"], s["D"])]
    return [(s["L"], *side) for side in sides]


def test_fresh_adapters_change_nothing(plain_model: Model) -> None:
    config, lora, ids = plain_model.config, Lora(3), reference.tokens(9)
    factors = new_factors(config, lora, 0)
    changed = replace(plain_model, params=with_factors(plain_model.params, lay_out(config, lora, factors)))
    assert np.array_equal(jm.forward(plain_model, ids)[0], jm.forward(changed, ids)[0])
    factors["model.layers.{l}.mlp.down_proj"]["B"][1] = 0.1
    changed = replace(plain_model, params=with_factors(plain_model.params, lay_out(config, lora, factors)))
    assert not np.array_equal(jm.forward(plain_model, ids)[0], jm.forward(changed, ids)[0])


@pytest.mark.parametrize(
    ("given", "said"), [({"epochs": 1e12}, "steps; at most 10,000,000"), ({"rank": 10**9}, "more than any matrix has")]
)
def test_what_no_memory_holds_is_refused_first(plain_model: Model, given: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        jm.finetune(plain_model, EXAMPLES, **given)


@pytest.mark.slow
def test_strength_scales_what_was_learnt(plain_model: Model, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2, "warmup": 0, "rank": 2}
    whole, half = (jm.finetune(plain_model, EXAMPLES, **how, strength=strength) for strength in (1.0, 0.5))
    assert [row["loss"] for row in whole.losses] == [row["loss"] for row in half.losses]
    for name, values in plain_model.params["blocks"].items():
        learnt, kept = (np.asarray(of.model.params["blocks"][name] - values) for of in (whole, half))
        assert np.abs(kept - 0.5 * learnt).max() < 1e-6
    pair = next(iter(half.factors.values()))  # type: ignore[union-attr]
    assert np.array_equal(pair["B"], 0.5 * np.asarray(next(iter(whole.factors.values()))["B"]))  # type: ignore[union-attr]
    with pytest.raises(jm.UserError, match="strength is of adapters"):
        jm.finetune(plain_model, EXAMPLES, method="full", strength=0.5)
