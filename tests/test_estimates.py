"""Estimates of first order: derivatives of full forwards, exact where the model is linear, counted, resumed, sharded and refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.interpreters import partial_eval

import jaxmed as jm
from jaxmed import results
from jaxmed.effects import estimates, first_order
from jaxmed.effects.cost import plan
from jaxmed.effects.job import make_job
from jaxmed.effects.mediators import MEDIATORS, units_of
from jaxmed.effects.pair_batches import batch_rows, shape_of
from jaxmed.effects.readout import Readout
from jaxmed.effects.request import Request
from jaxmed.interventions.edits import Edit
from jaxmed.models.checkpoints.export import export_folder
from jaxmed.models.load import from_params
from jaxmed.models.model import Model
from jaxmed.models.rules import EXACT
from jaxmed.runs.cost import count_flops, propagate_flops
from jaxmed.runs.folder import read_run
from jaxmed.tokens import align, render
from tests import naive, tiny
from tests.conftest import QUICK_COMPILES
from tests.exported import written

WINDOW = 7
STEP = 0.02
SLOPES = 3e-3
"""Central differences (of fourth order) of float32 forwards against gradients, relative to the largest effect of a kind."""
MODEL = cache(tiny.model)
UNITS = tuple(unit for unit in MEDIATORS if unit != "up")
"""Kinds of units of a model whose MLP has one branch."""


def _width(model: Model) -> int:
    """A window that leaves a short one, and in a mixture none."""
    return 4 if model.config.experts else WINDOW


def _moved(model: Model, pair: jm.PromptPair, patch: Any, unit: str, layer: int, index: int, step: float) -> dict[str, Edit]:
    """The unit a little on its way to its source value. Sites that are swapped together do not answer to each other."""
    whole = naive.swap(model, pair, patch, unit, layer, index, _width(model))
    if len(whole) == 1:
        return {site: replace(edit, gate=step * np.asarray(edit.gate)) for site, edit in whole.items()}
    taps = jm.forward(model, naive._padded(render(model.tokenizer, pair, "base").ids), taps=tuple(whole))[1]
    change = sum(np.asarray(edit.gate) * (np.asarray(edit.value) - np.asarray(taps[site])) for site, edit in whole.items())
    return {"residual_out": Edit(np.float32(0), np.float32(0), np.asarray(step * change, np.float32))}


def _slopes(model: Model, pair: jm.PromptPair, position: str, unit: str, layer: int, index: int, name: str) -> list[float]:
    sides = render(model.tokenizer, pair, "base"), render(model.tokenizer, pair, "source")
    found = []
    for patch in align(*sides, position):
        at = lambda step: naive.outcome(model, pair, "base", name, _moved(model, pair, patch, unit, layer, index, step))  # noqa: E731,B023
        found.append((8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP))
    return found


def _compare(model: Model, pairs: tuple[jm.PromptPair, ...], position: str, outcomes: tuple[str, ...], count: int) -> None:
    table = jm.sweep(model, pairs, outcomes, units_of(model.config), position, _width(model), method="attribution")
    for unit in units_of(model.config):
        mediator = MEDIATORS[unit]
        rng = np.random.default_rng(len(unit))
        largest, wrong = 1e-2, 0.0
        for pair in pairs:
            for name in outcomes:
                for _ in range(count):
                    layer, index = int(rng.integers(model.config.layers)), int(rng.integers(mediator.count(model.config, _width(model))))
                    at = {"pair": pair.id, "layer": layer} | ({"outcome": name} if len(outcomes) > 1 else {})
                    at |= {mediator.coordinate: index} if mediator.coordinate else {}
                    found = np.atleast_1d(table[unit].sel(at).values)
                    wanted = np.asarray(_slopes(model, pair, position, unit, layer, index, name))
                    assert np.isnan(found[: -len(wanted)]).all()
                    wrong = max(wrong, float(np.abs(found[-len(wanted) :] - wanted).max()))
                    largest = max(largest, float(np.abs(wanted).max()))
        assert wrong <= SLOPES * max(largest, 1.0), unit


@pytest.mark.parametrize(
    "kind", ["llama", "post_norm", "mixture", *(pytest.param(one, marks=pytest.mark.slow) for one in ("four_norms", "windowed_biased"))]
)
def test_estimates_are_derivatives_of_full_forwards(kind: str) -> None:
    _compare(MODEL(kind), tiny.PAIRS[1:2], "user_last", ("log-odds", "logprob"), 2)


@pytest.mark.parametrize("position", ["last", "user", pytest.param("all", marks=pytest.mark.slow)])
def test_estimates_of_several_tokens_and_answers(plain_model: Model, position: str) -> None:
    _compare(plain_model, tiny.LONG[:1], position, ("prefix-gap", "sequence-logprob"), 2)


def test_estimates_at_each_position_of_pairs_of_different_lengths(plain_model: Model) -> None:
    _compare(plain_model, tiny.PAIRS[1:], "each", ("log-odds",), 1)


@cache
def linear() -> Model:
    """A model that is linear in every activation: norms that divide by a constant, attention that looks everywhere alike, and neurons whose
    rectifiers are always open."""
    config = replace(tiny.LLAMA, norm_eps=1e12, activation="relu", gated=False, mlp_bias=True)
    tiny.CONFIGS["linear"] = config
    model = tiny.model("linear")
    blocks = dict(model.params["blocks"])
    blocks["qkv"] = blocks["qkv"].at[..., : config.group, :].set(0.0)
    blocks |= {name: np.full(blocks[name].shape, 1e6, np.float32) for name in ("attention_norm", "mlp_norm")}
    blocks["gate_up"], blocks["gate_up_bias"] = 0.02 * blocks["gate_up"], np.full(blocks["gate_up_bias"].shape, 30, np.float32)
    blocks["down"] = blocks["down"] - blocks["down"].mean(1, keepdims=True)  # what opens the rectifiers adds nothing
    params = {**model.params, "blocks": blocks, "final_norm": np.full(config.width, 1e6, np.float32)}
    return from_params(config, jax.device_put(params, jax.NamedSharding(model.mesh, jax.P())), model.mesh, "linear", tiny.tokenizer())


@pytest.mark.parametrize("position", ["last", "each"])
def test_estimates_of_a_linear_model_are_exact(position: str) -> None:
    pairs = [replace(pair, target=pair.target[:1], foil=pair.foil[:1]) for pair in tiny.PAIRS]
    both = [jm.sweep(linear(), pairs, "logit-diff", UNITS, position, WINDOW, method=method) for method in ("exact", "attribution")]
    for unit in UNITS:
        exact, estimate = (table[unit].values for table in both)
        assert float(np.nanmax(np.abs(exact))) > 1e-2
        assert np.isnan(exact).tolist() == np.isnan(estimate).tolist()
        assert float(np.nanmax(np.abs(exact - estimate))) <= 2e-4 * float(np.nanmax(np.abs(exact)))


def test_functions_of_logits_equal_the_built_in_outcome(plain_model: Model) -> None:
    pair = replace(tiny.PAIRS[0], target=("S",), foil=("N",))
    ids = [plain_model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("S", "N")]

    def difference(logits: jax.Array) -> jax.Array:
        return logits[ids[0]] - logits[ids[1]]

    values = jm.sweep(plain_model, [pair], ("logit-diff", difference), method="attribution").neuron.transpose("outcome", ...).values
    assert np.abs(values[0] - values[1]).max() <= 1e-5
    assert np.abs(values).max() > 1e-2


@pytest.mark.parametrize("patch", ["zero", "mean", "scale", "steer"])
def test_patches_change_what_is_written(plain_model: Model, patch: str) -> None:
    """Estimates are linear in what is written: those of the last layer's whole stream, at a model that is linear behind it."""
    pairs = [replace(pair, target=pair.target[:1], foil=pair.foil[:1]) for pair in tiny.PAIRS]
    both = [jm.sweep(linear(), pairs, "logit-diff", ("mlp_out", "neuron"), patch=patch, method=one) for one in ("exact", "attribution")]
    for unit in ("mlp_out", "neuron"):
        exact, estimate = (table[unit].values for table in both)
        assert np.abs(exact - estimate).max() <= 5e-4 * np.abs(exact).max()
        assert np.abs(exact).max() > 1e-2


def test_reversed_and_between_models(plain_model: Model) -> None:
    changed = jax.tree.map(lambda x: x * 1.01, plain_model.params)
    other = from_params(plain_model.config, changed, plain_model.mesh, "other", tiny.tokenizer())
    turned = [replace(pair, base=pair.source, source=pair.base) for pair in tiny.PAIRS]
    how: dict[str, Any] = {"unit": ("neuron", "head_out"), "method": "attribution"}
    forth, back = jm.sweep(plain_model, turned, **how), jm.sweep(plain_model, tiny.PAIRS, direction="reverse", **how)
    assert np.abs(forth.neuron.values - back.neuron.values).max() <= 1e-5
    table = jm.sweep(plain_model, tiny.PAIRS, contrast="model", source_model=other, **how)
    exact = jm.sweep(plain_model, tiny.PAIRS, contrast="model", source_model=other, unit=("neuron", "head_out"))
    assert np.abs(table.source_outcome.values - exact.source_outcome.values).max() <= 1e-5
    assert np.corrcoef(table.head_out.values.ravel(), exact.head_out.values.ravel())[0, 1] > 0.9


def test_relevance_is_the_gradient_where_nothing_bends() -> None:
    pairs = [replace(pair, target=pair.target[:1], foil=pair.foil[:1]) for pair in tiny.PAIRS[:1]]
    found = [jm.sweep(linear(), pairs, "logit-diff", UNITS, window=WINDOW, method=method) for method in ("attribution", "relp")]
    for unit in ("attention_out", "head_out", "residual_out"):
        first, second = (table[unit].values for table in found)
        assert np.abs(first - second).max() <= 1e-2 * np.abs(first).max()


def test_relevance_of_the_last_layer_holds_the_final_norm_constant(plain_model: Model) -> None:
    """What a unit of the last layer adds, times the unembedding at the base run's norm."""
    pair = replace(tiny.PAIRS[0], target=("S",), foil=("N",))
    table = jm.sweep(plain_model, [pair], "logit-diff", "mlp_out", method="relp")
    runs = [
        jm.forward(plain_model, render(tiny.tokenizer(), pair, side).ids, taps=("mlp_out", "residual_out"))[1]
        for side in ("base", "source")
    ]
    (base, source), stream = ([np.asarray(one["mlp_out"])[-1, 0, -1] for one in runs], np.asarray(runs[0]["residual_out"])[-1, 0, -1])
    scale = np.asarray(plain_model.params["final_norm"]) / np.sqrt(np.mean(stream**2) + plain_model.config.norm_eps)
    ids = [plain_model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("S", "N")]
    rows = np.asarray(plain_model.params["head"])[ids]
    wanted = float(((source - base) * scale) @ (rows[0] - rows[1]))
    assert float(table.mlp_out.values[0, -1]) == pytest.approx(wanted, rel=1e-4)


def _flops(model: Model, pair: jm.PromptPair, position: str, method: str = "attribution") -> tuple[float, float, float]:
    """Matmul FLOPs of a pair's programs, what the plan says, and those of a forward of the base."""
    outcomes, drops = ("log-odds",), method == "attribution-star"
    job = make_job(model, [pair], Request(outcomes, tuple(MEDIATORS), position, WINDOW, method=method))
    contrast, config, params = job.contrasts[0], model.config, model.params
    rows, readout = batch_rows([contrast], 1), Readout(outcomes, 1)
    sites = first_order.sites_of(job.request.units)

    def programs(rows: Any) -> Any:
        written, *_ = first_order.run_source(config, params, rows, sites, readout)
        base = first_order.run_base(config, params, rows, first_order.narrow(sites), readout)
        return first_order.estimate(config, params, rows, base, written, job.request.units, WINDOW, EXACT, 0, drops)

    jaxpr = jax.make_jaxpr(programs)(rows)
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals))
    planned = plan(job).cost.flops / estimates.rows_of(job, estimates.FirstOrder(EXACT).items(job)[0])
    return count_flops(used), planned, propagate_flops(config, 1, shape_of(contrast).length, 0, config.layers)


@pytest.mark.parametrize("position", ["last", "each"])
def test_all_units_of_a_pair_cost_four_forwards_at_most(position: str) -> None:
    """Of a model whose unembedding is small beside its blocks; matmuls that nothing needs are left out, as the compiler does."""
    tiny.CONFIGS["wide"] = replace(tiny.LLAMA, layers=4, width=256, heads=4, head_width=64, neurons=512)
    found, planned, forward = _flops(tiny.model("wide"), tiny.PAIRS[0], position)
    assert found <= 4 * forward
    assert planned == pytest.approx(found, rel=0.03)
    more, planned, _ = _flops(tiny.model("wide"), tiny.PAIRS[0], position, "attribution-star")
    assert more > found
    assert planned == pytest.approx(more, rel=0.03)


def test_one_program_per_shape_whatever_the_number_of_pairs(plain_model: Model) -> None:
    program: Any = first_order.estimate
    program.clear_cache()
    pairs = [replace(pair, id=f"{pair.id} {number}") for pair in tiny.PAIRS for number in range(7)]
    job = make_job(plain_model, pairs, Request(units=("neuron", "mlp_out"), method="attribution"))
    jm.sweep(plain_model, pairs, unit=("neuron", "mlp_out"), method="attribution")
    assert program._cache_size() == len({shape_of(contrast) for contrast in job.contrasts}) == len(job.chunk)


def test_the_plan_counts_effects_and_passes_that_are_done(plain_model: Model, tmp_path: Path) -> None:
    request = Request(units=tuple(MEDIATORS), position="each", window=WINDOW, method="attribution")
    planned = plan(make_job(plain_model, tiny.PAIRS, request))
    table = jm.sweep(
        plain_model, tiny.PAIRS, unit=tuple(MEDIATORS), position="each", window=WINDOW, method="attribution", out=tmp_path / "run"
    )
    assert planned.effects == sum(int(np.isfinite(table[unit].values).sum()) for unit in MEDIATORS)
    assert planned.cost.passes == sum(session["passes"] for session in read_run(tmp_path / "run")["sessions"])
    assert any("first-order estimates" in line for line in planned.lines())
    assert not any("exact" in line for line in planned.lines())


def test_an_interrupted_run_resumes_to_the_same_bits(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [replace(pair, id=f"{pair.id} {number}") for pair in tiny.PAIRS for number in range(5)]
    how: dict[str, Any] = {"unit": ("neuron", "head_out", "mlp_out"), "method": "attribution"}
    monkeypatch.setattr("jaxmed.effects.job.pairs_per_device", lambda *_: 1)
    whole, seen = jm.sweep(plain_model, pairs, **how), []

    def interrupt(work: float, count: int, what: str) -> None:
        seen.append(what)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jm.sweep(plain_model, pairs, **how, out=tmp_path / "run", watch=interrupt)
    table = results.Table(tmp_path / "run")
    assert 0 < int(table.done().sum()) < table.done().size
    table.mark_done(0, 1, 0)  # as if it had been killed between two markers
    again = jm.sweep(plain_model, pairs, **how, out=tmp_path / "run", resume=True)
    for name in whole:
        assert np.array_equal(whole[name].values, again[name].values, equal_nan=whole[name].dtype.kind == "f"), name


def test_records_and_pages_say_that_these_are_estimates(plain_model: Model, tmp_path: Path) -> None:
    from jaxmed.reports.page import write_report

    table = jm.sweep(plain_model, tiny.PAIRS, unit=("neuron", "mlp_out"), method="attribution", out=tmp_path / "run")
    assert table.attrs["method"] == "attribution"
    assert "estimate" in table.neuron.attrs["formula"]
    assert "noise_floor" not in table
    assert "base_lowest" not in table
    assert read_run(tmp_path / "run")["manifest"]["request"]["method"] == "attribution"
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "first-order estimates" in page
    assert "Noise floor" not in page
    with pytest.raises(jm.UserError, match="another request"):
        jm.sweep(plain_model, tiny.PAIRS, unit=("neuron", "mlp_out"), out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "atribution"}, "Did you mean 'attribution'"),
        ({"outcome": "kl"}, "--method integrated or --method exact, or another outcome: logit-diff"),
        ({"estimand": "direct"}, "'direct' is computed"),
        ({"sets": {"two": [("neuron", 0, 1), ("neuron", 1, 2)]}}, "--method exact for them"),
        ({"outcome": lambda logits: (logits.argmax() == 3).astype(np.float32)}, "has none but zero"),
        (
            {"outcome": lambda logits: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), np.float32), logits[0])},
            "cannot be differentiated",
        ),
        ({"outcome": lambda logits: jax.numpy.sqrt(logits[0] * 0.0)}, "not finite"),
    ],
)
def test_what_has_no_estimate_is_refused(plain_model: Model, how: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        jm.sweep(plain_model, tiny.PAIRS, **{"unit": "mlp_out", "method": "attribution", **how})


def _autograd(folder: Path, ids: dict[str, np.ndarray], answers: tuple[int, int]) -> dict[str, np.ndarray]:
    """Change times gradient at the last token, [L, ...] per kind of unit, from hooks and PyTorch's autograd."""
    found = {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        value.retain_grad()
        seen.setdefault(name, []).append(value)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.o_proj.register_forward_pre_hook(lambda _, inputs: keep("head_out", inputs[0]))
        attention.o_proj.register_forward_hook(lambda _, __, out: keep("attention_out", out))
        mlp.down_proj.register_forward_pre_hook(lambda _, inputs: keep("neuron", inputs[0]))
        mlp.down_proj.register_forward_hook(lambda _, __, out: keep("mlp_out", out))
    logits = model(torch.as_tensor(ids["source"].astype(np.int64))[None]).logits
    source, seen = {name: [one.detach()[0, -1] for one in values] for name, values in seen.items()}, {}
    logits = model(torch.as_tensor(ids["base"].astype(np.int64))[None]).logits[0, -1]
    (logits[answers[0]] - logits[answers[1]]).backward()
    for name, values in seen.items():
        grads = [(there - one.detach()[0, -1]) * one.grad[0, -1] for there, one in zip(source[name], values, strict=True)]  # type: ignore[index]
        found[name] = torch.stack(grads).numpy()
    return found


@pytest.mark.parametrize("name", ["tiny", pytest.param("default", marks=pytest.mark.slow)])
def test_estimates_equal_autograd_of_pytorch(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name == "tiny":
        folder, pair = written(tmp_path / "model"), replace(tiny.PAIRS[0], target=("S",), foil=("N",))
        model = jm.load(str(folder))
    else:
        model, pair = request.getfixturevalue("default_model"), replace(jm.read_pairs("harm")[0], target=("Yes",), foil=("No",))
        folder = export_folder(model, tmp_path / "model")
    units = ("neuron", "head_out", "attention_out", "mlp_out")
    (contrast,) = make_job(model, [pair], Request(("logit-diff",), units, method="attribution", window=1)).contrasts
    table = jm.sweep(model, [pair], "logit-diff", units, method="attribution")
    target, foil = (ids[0] for ids in contrast.answers.ids)
    wanted = _autograd(folder, {"base": contrast.base.ids, "source": contrast.source.ids}, (target, foil))
    wanted["head_out"] = wanted["head_out"].reshape(model.config.layers, model.config.heads, -1)
    for unit in units:
        found = table[unit].values[0]
        there = wanted[unit] if unit == "neuron" else wanted[unit].sum(-1)
        assert np.abs(found - there).max() <= 1e-4 * np.abs(there).max(), unit


@pytest.mark.slow
def test_eight_devices_agree_with_one() -> None:
    """In a process of its own, for its eight devices."""
    code = (
        "import numpy as np, jaxmed as jm\n"
        "from dataclasses import replace\n"
        "from tests import tiny\n"
        "pairs = [replace(pair, id=f'{pair.id} {n}') for pair in tiny.PAIRS for n in range(3)]\n"
        "how = dict(unit=('neuron', 'head_out', 'both_out'), position='each', outcome=('prefix-gap', 'log-odds'), method='attribution')\n"
        "tables = [jm.sweep(tiny.model('llama', mesh=mesh), pairs, **how) for mesh in ('data=1', 'data=8', 'data=2,tensor=2')]\n"
        "for other in tables[1:]:\n"
        "    for name in ('neuron', 'head_out', 'both_out', 'base_outcome', 'source_outcome'):\n"
        "        print(float(np.nanmax(np.abs(other[name].values - tables[0][name].values))))\n"
    )
    flags = f"{QUICK_COMPILES} --xla_force_host_platform_device_count=8"
    where: dict[str, Any] = {"cwd": Path(__file__).parents[1], "env": {**os.environ, "XLA_FLAGS": flags}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr[-2000:]
    apart = [float(line) for line in done.stdout.split()]
    assert len(apart) == 10
    assert max(apart) <= 1e-5
