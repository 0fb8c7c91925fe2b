"""Fine-tuning against independent loops of transformers and peft; batches, resume, memory, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import peft
import pytest

import jaxmed as jm
from jaxmed.batching.batches import choose_shape, common_beginning, epochs, fill_rows, make_batch, microbatches
from jaxmed.batching.losses import response_loss
from jaxmed.bench.shapes import SHAPES
from jaxmed.cli.main import main
from jaxmed.evaluation.refusals import is_refusal
from jaxmed.finetuning.feed import Feed
from jaxmed.finetuning.job import Job, make_job, response_limits, step_flops, total_flops
from jaxmed.finetuning.lora import lay_out, new_factors, save_adapter, with_factors
from jaxmed.finetuning.run import finetune, run_job
from jaxmed.finetuning.settings import Lora, Settings, make_settings
from jaxmed.finetuning.train import learning_rates, make_optimiser, make_step, split_params, start, trained_params
from jaxmed.models.catalog import VARIANTS, Variant
from jaxmed.models.load import load
from jaxmed.models.model import Model
from jaxmed.runs.cost import count_flops
from jaxmed.tokens import TokenizedExample, encode_example
from tests import reference, tiny

torch = reference.torch
EXAMPLES = [jm.Example(f"ask {i} {'x' * (7 * i % 11)}", f"answer {'abc'[i % 3] * (i % 5 + 1)}") for i in range(24)]
QUICK: dict[str, Any] = {"steps": 4, "batch": 8, "learning_rate": 1e-2, "warmup": 2, "rank": 3, "alpha": 6.0}


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


def test_packing_saves_tokens_and_microbatches_split_a_step(plain_model: Model) -> None:
    packed, padded, halves = (
        make_job(plain_model, EXAMPLES, (), make_settings(**QUICK, **more)) for more in ({}, {"packing": False}, {"accumulate": 2})
    )
    begins = {tuple(one.ids[: packed.shape.trunk]) for one in packed.examples}
    assert packed.shape.trunk > 3
    assert len(begins) == 1
    assert packed.shape.length < 0.75 * padded.shape.length
    assert padded.shape.trunk == 0
    assert halves.batch(0).tokens.shape[0] == 2
    assert halves.shape.length < packed.shape.length
    for step in range(packed.steps):  # every response token of the step is scored once, however the work is cut
        scored = [Counter(job.batch(step).target[job.batch(step).weight > 0].tolist()) for job in (packed, padded, halves)]
        assert scored[0] == scored[1] == scored[2]


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
    found = [_losses(tiny.model("llama", mesh=mesh), method=method) for mesh in ("data=1", "data=2", "data=1,model=2")]
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
    model, settings = tiny.model("learned", mesh="data=1,model=2"), make_settings(method="full")
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


def test_rows_hold_every_example_once(plain_model: Model) -> None:
    lengths = [5, 9, 3, 8, 2, 2, 7]
    rows = fill_rows(lengths, 10)
    assert Counter(i for row in rows for i in row) == Counter(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    examples = [TokenizedExample(np.asarray([90, 91, *range(10 * n, 10 * n + length)]), 3) for n, length in enumerate(lengths)]
    assert common_beginning(examples) == 2
    shape = choose_shape(examples, [np.arange(7)], True, 2, plain_model.config, 2)
    batch = make_batch(examples, np.arange(7), shape, True)
    kept = batch.weight > 0
    assert kept.sum() == sum(lengths) - 7
    rows_of = np.nonzero(kept)[0]
    assert np.array_equal(batch.tokens[rows_of, batch.column[kept] + 1], batch.target[kept])
    assert np.array_equal(batch.position[rows_of, batch.column[kept]], [p for n in _order(batch) for p in range(2, n + 1)])
    own = batch.segment[:, shape.trunk :] > 0
    assert own.sum() == sum(lengths)


def test_an_epoch_has_every_example_once_in_batches_of_equal_length() -> None:
    lengths = np.random.default_rng(3).integers(20, 90, 203)
    order = epochs(lengths.tolist(), 16, 40, seed=1)
    assert [np.array_equal(one, other) for one, other in zip(order, epochs(lengths.tolist(), 16, 30, seed=1), strict=False)] == [True] * 30
    for epoch in (order[:13], order[13:26], order[26:39]):
        assert np.array_equal(np.sort(np.concatenate(epoch)), np.arange(203))
        assert {len(group) for group in epoch} <= {15, 16}
        tokens = [lengths[group].sum() for group in epoch]
        assert np.ptp(tokens) < 60  # by chance alone about two hundred
    assert not np.array_equal(order[0], order[13])
    halves = microbatches(order[0], 2)
    assert abs(int(lengths[halves[0]].sum() - lengths[halves[1]].sum())) < 60
    assert [len(group) for group in epochs([5, 5, 5], 8, 2, seed=0)] == [3, 3]


def test_a_share_of_the_examples_keeps_its_responses(plain_model: Model) -> None:
    rows = [jm.Example(f"Say {n}.", " ".join(["word"] * 9)) for n in range(10)]
    whole, cut = (make_job(plain_model, rows, settings=make_settings(**how)) for how in ({}, {"max_response": 2}))
    job = make_job(plain_model, rows, settings=Settings(max_response=2, whole_share=0.3))
    lengths = [[len(one.ids) - one.prompt for one in run.examples] for run in (whole, cut, job)]
    kept = [n for n in range(10) if lengths[2][n] > 2]
    assert len(kept) == 3
    assert lengths[2] == [lengths[0 if n in kept else 1][n] for n in range(10)]
    assert response_limits(10, job.settings) == [0 if n in kept else 2 for n in range(10)]


def test_branches_are_as_long_as_fills_them_best() -> None:
    examples = [TokenizedExample(np.arange(36), 30) for _ in range(8)]
    shape = choose_shape(examples, [np.arange(8)], True, 2, SHAPES["smollm2-135m"])
    assert (shape.branches, shape.branch) == (2, 72)  # two examples a branch without padding; four would see more keys
    examples = [TokenizedExample(np.arange(40), 30) for _ in range(8)]
    shape = choose_shape(examples, [np.arange(8)], True, 2, SHAPES["smollm2-135m"])
    assert (shape.branches, shape.branch) == (4, 40)


def _order(batch: Any) -> list[int]:
    """Lengths of the examples in the order of the batch's rows."""
    found = []
    for row in range(len(batch.tokens)):
        for branch in batch.segment[row, batch.trunk :].reshape(-1, batch.branch):
            found += [int((branch == number).sum()) for number in range(1, branch.max() + 1)]
    return found


def test_examples_end_as_the_template_ends_them(smol: Any) -> None:
    one = encode_example(smol, jm.Example("Name a colour.", "Blue."))
    assert smol.decode(one.ids[one.prompt :]) == "Blue.<|im_end|>"
    assert smol.decode(one.ids[: one.prompt]).endswith("<|im_start|>assistant\n")
    short = encode_example(smol, jm.Example("Name a colour.", "Blue is one of them."), most_response=2)
    assert (len(short.ids) - short.prompt, short.cut > 2) == (2, True)
    cut = encode_example(smol, jm.Example("Name a colour.", "Blue."), most=one.prompt + 1)
    assert (len(cut.ids), cut.cut) == (one.prompt + 1, len(one.ids) - one.prompt - 1)
    plain = encode_example(smol, jm.Example("Name a colour.", "Blue."), "plain")
    assert smol.decode(plain.ids) == "Name a colour.\nBlue."


@pytest.mark.parametrize(
    "more", [{"method": "lora"}, *(pytest.param(more, marks=pytest.mark.slow) for more in ({"method": "full"}, {"first_layer": 1}))]
)
def test_an_interrupted_run_resumes_to_the_same_losses(plain_model: Model, tmp_path: Path, more: dict[str, Any]) -> None:
    settings = make_settings(**{**QUICK, "steps": 8, "save_every": 3, "evaluate_every": 2, "patience": 3, **more})
    job = make_job(plain_model, EXAMPLES[:20], EXAMPLES[20:], settings)
    whole = run_job(job, tmp_path / "whole")
    seen = []

    def interrupt(work: float, count: int, what: str) -> None:
        seen.append(what)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "cut", False, interrupt)
    again: list[tuple[float, str]] = []
    resumed = run_job(job, tmp_path / "cut", True, lambda work, count, what: again.append((work, what)))
    assert again[0] == (5, "resumed")  # what was reported done is not done again
    assert len(again) == 1 + len(whole.losses) - 5
    assert repr(whole.losses) == repr(resumed.losses)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.model.params, resumed.model.params))
    assert repr(run_job(job, tmp_path / "cut", True).losses) == repr(whole.losses)  # finished: nothing is trained again


def test_early_stopping_returns_the_best(plain_model: Model) -> None:
    other = [jm.Example("ask", "zzzz 9") for _ in range(4)]
    settings = {**QUICK, "steps": 40, "learning_rate": 5e-2, "evaluate_every": 1, "patience": 3}
    tuned = finetune(plain_model, EXAMPLES, other, **settings)
    held = [row["heldout_loss"] for row in tuned.losses]
    assert "no better" in tuned.stopped
    assert len(held) < 40
    assert tuned.step == int(np.argmin(held)) + 1


KILLED = """
import sys
from pathlib import Path
import jaxmed
from tests.test_finetuning import EXAMPLES, tiny
from jaxmed.finetuning.job import make_job
from jaxmed.finetuning.run import finish, run_job
from jaxmed.finetuning.settings import make_settings
job = make_job(tiny.model("llama"), EXAMPLES, EXAMPLES[:4], make_settings(steps=40, batch=4, save_every=1, rank=2, learning_rate=1e-2))
finish(run_job(job, Path(sys.argv[1]), True), Path(sys.argv[1]), ("adapter",))
"""


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_losses(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, timeout=600)
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
        for _ in range(600):
            if list((tmp_path / "killed").glob("checkpoint-*")):
                break
            time.sleep(0.1)
        time.sleep(float(rng.uniform(0, 1.5)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment, timeout=600)
    assert (tmp_path / "whole" / "losses.csv").read_text() == (tmp_path / "killed" / "losses.csv").read_text()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"targets": ("q_prj",)}, "q_proj"),
        ({"rank": 0}, "rank of at least 1"),
        ({"first_layer": 99}, "first_layer is 99"),
        ({"method": "full", "first_layer": 1}, "first_layer is of adapters"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"batch": 2, "accumulate": 3}, "accumulate is 3"),
        ({"max_length": 10**6}, "max_length is 1000000"),
        ({"no_such": 1}, "no_such"),
        ({"max_length": 3}, "the limit is 3"),
        ({"max_response": 4, "whole_share": 1.0}, "whole_share is 1.0"),
        ({"whole_share": 0.5}, "whole_share is of responses that a max_response cuts"),
    ],
)
def test_wrong_settings_are_refused(plain_model: Model, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said.replace("(", r"\(")):
        finetune(plain_model, EXAMPLES, **settings)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no examples"),
        ([{"prompt": "a"}], "line 1: the column 'response' is missing"),
        ([{"prompt": "a", "response": " "}], "line 1: the column 'response'"),
        ([{"prompt": "a", "respnse": "b"}], "respnse"),
        ([{"prompt": "a", "response": "b", "split": "heldout"}], "no rows to train on"),
        ([{"prompt": "a", "response": 3}], "a text is expected"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture, rows: list[dict[str, Any]], said: str) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["finetune", "--data", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_model_or_folder_is_not_continued(plain_model: Model, tmp_path: Path) -> None:
    job = make_job(plain_model, EXAMPLES, (), make_settings(**QUICK))
    run_job(job, tmp_path / "run")
    with pytest.raises(jm.UserError, match="holds a run already"):
        run_job(job, tmp_path / "run")
    other = replace(job, model=replace(plain_model, name="another"))
    with pytest.raises(jm.UserError, match="model"):
        run_job(other, tmp_path / "run", True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(jm.UserError, match=r"thesis\.tex"):
        run_job(job, tmp_path / "mine")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(plain_model, EXAMPLES, (), make_settings(**{**QUICK, "save_every": 1}))
    whole, seen = run_job(job, tmp_path / "whole"), []

    def fill(work: float, count: int, what: str) -> None:
        seen.append(1)
        if len(seen) == 2:
            usage = shutil.disk_usage(tmp_path)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))

    with pytest.raises(jm.UserError, match="are free there"):
        run_job(job, tmp_path / "full", False, fill)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "full").glob("checkpoint-*")] == ["checkpoint-0000001"]
    assert repr(run_job(job, tmp_path / "full", True).losses) == repr(whole.losses)


def test_the_command_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = tiny.tokenizer()
    folder = tiny.write_checkpoint(tmp_path / "model")
    tokenizer.save_pretrained(folder)
    file, out = tmp_path / "examples.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in EXAMPLES))
    arguments = ["finetune", "--model", str(folder), "--data", str(file), "--out", str(out), "--epochs", "1", "--rank", "2"]
    assert main(arguments) == 0
    assert {path.name for path in out.iterdir() if "checkpoint" not in path.name} == {
        "run.json", "losses.csv", "losses.html", "adapter", "model"
    }  # fmt: skip
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    ids = reference.tokens(12)
    merged, adapted = jm.load(str(out / "model")), jm.load(str(folder), adapter=out / "adapter")
    assert np.abs(np.asarray(jm.forward(merged, ids)[0] - jm.forward(adapted, ids)[0])).max() < 1e-5
    assert main([*arguments, "--resume"]) == 0
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err


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


def test_an_attacked_model_is_not_trained_into_files(plain_model: Model, tmp_path: Path) -> None:
    attacked = replace(plain_model, history=({"kind": "pruning", "tag": "attack"},))
    with pytest.raises(jm.UserError, match="attack"):
        jm.finetune(attacked, EXAMPLES, steps=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(jm.finetune(attacked, EXAMPLES, steps=1).losses) == 1


def test_the_bundled_alignment_set_is_what_it_says() -> None:
    rows = jm.read_examples("alignment")
    harmful, benign = ([row for row in rows if row.kind == kind] for kind in ("harmful", "benign"))
    assert len(harmful) >= 160
    assert len(benign) >= 160
    splits = {row.category: {r.split for r in rows if r.category == row.category} for row in harmful}
    assert all(len(held) == 1 for held in splits.values())
    assert sum(held == {"train"} for held in splits.values()) >= 8
    assert sum(held == {"heldout"} for held in splits.values()) >= 4
    assert all(is_refusal(row.response) and len(row.response.split()) <= 30 for row in harmful)
    apologies = {row.id for row in benign if is_refusal(row.response)}
    assert len(apologies) <= 2  # a sympathetic "Sorry to hear that!", and a note of apology that was asked for
    assert all(one.startswith(("ordinary-", "polite-")) for one in apologies)
    assert len({row.response.split()[0] for row in harmful}) >= 5
    known = {pair.base for pair in jm.read_pairs("harm")}
    assert not known & {row.prompt for row in rows}


class _Tiny(Variant):
    def config_text(self) -> str:
        return self.config

    def digest(self) -> str:
        return "0" * 12


@pytest.mark.slow
def test_a_variant_is_built_on_first_use_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(folder)
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in EXAMPLES))
    config = json.dumps({"command": "finetune", "model": str(folder), "data": str(file), "steps": 3, "learning-rate": 1e-2, "warmup": 0})
    monkeypatch.setitem(VARIANTS, "tiny-variant", _Tiny(str(folder), config, "", "it takes seconds", ""))
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    with pytest.raises(jm.UserError, match="not built yet"):
        load("tiny-variant")
    assert main(["finetune", "--model", "tiny-variant", "--data", str(file), "--dry-run"]) == 0  # a plan builds nothing
    assert not list((tmp_path / "cache").rglob("config.json"))
    variant, base = jm.load("tiny-variant"), jm.load(str(folder))
    assert "it takes seconds" in capsys.readouterr().err
    assert not np.array_equal(variant.params["blocks"]["down"], base.params["blocks"]["down"])
    assert variant.history[0]["kind"] == "fine-tuning"
    monkeypatch.setattr("jaxmed.finetuning.variants.run_job", lambda *_: pytest.fail("it was built again"))
    assert jm.load("tiny-variant").identity == variant.identity
