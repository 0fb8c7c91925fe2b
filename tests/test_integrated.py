"""Integrated gradients: a plain loop of gradients, completeness, the plan, and outcomes whose slope at the base run says little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed import results
from jaxmed.effects import first_order
from jaxmed.effects.cost import plan
from jaxmed.effects.estimators import find_estimator
from jaxmed.effects.integrated import integrate, points_of
from jaxmed.effects.job import make_job
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.pair_batches import batch_rows, shape_of
from jaxmed.effects.readout import Readout
from jaxmed.effects.request import Request
from jaxmed.interventions.edits import Edit
from jaxmed.models.load import from_params
from jaxmed.models.model import Model
from jaxmed.runs.cost import count_flops
from jaxmed.runs.folder import read_run
from jaxmed.tokens import Patch, align, render
from tests import naive, tiny

MANY = 64
"""Points with which the tiny models' ways are known: they bend sharply."""


def _outcome(model: Model, pair: jm.PromptPair, name: str) -> Any:
    """A function of the last token's logits."""
    first = lambda texts: [model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts]  # noqa: E731
    source = jm.forward(model, naive._padded(ids := render(model.tokenizer, pair, "source").ids))[0][0, len(ids) - 1]
    target = jax.nn.log_softmax(source)
    if name == "kl":
        return lambda logits: -jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(logits)))
    total = lambda logits, texts: jax.nn.logsumexp(logits[jnp.asarray(first(texts))])  # noqa: E731
    return lambda logits: total(logits, pair.target) - total(logits, pair.foil)


def _slow(model: Model, pair: jm.PromptPair, patch: Patch, unit: str, points: int, name: str) -> np.ndarray:
    """Integrated gradients of every layer's units [L,count]: a full forward and a gradient in the gate of every element for every point."""
    ids, mediator, width = render(model.tokenizer, pair, "base").ids, MEDIATORS[unit], 4
    padded, read = naive._padded(ids), _outcome(model, pair, name)
    moving = naive.moving(model, pair, patch, mediator.sites)
    entry = mediator.sites[0] if len(mediator.sites) == 1 else "residual_out"

    def outcome(gate: Any, change: Any) -> jax.Array:
        return read(jm.forward(model, padded, {entry: Edit(np.float32(0), np.float32(0), gate * change)})[0][0, len(ids) - 1])

    slope, found = jax.jit(jax.grad(outcome)), []
    for layer in range(model.config.layers):
        change = np.zeros_like(moving)
        change[layer] = moving[layer]
        nodes, weights = np.polynomial.legendre.leggauss(points)
        slopes: list[Any] = [
            w / 2 * slope(np.full(moving.shape, (1 + node) / 2, np.float32), change) for node, w in zip(nodes, weights, strict=True)
        ]
        found.append(naive.by_unit(model, unit, np.asarray(sum(slopes))[layer], width))
    return np.stack(found)


@pytest.mark.parametrize(
    ("kind", "name", "units"),
    [
        ("llama", "kl", ("neuron", "window", "head_out", "both_out")),
        ("post_norm", "log-odds", ("neuron", "attention_out")),
        pytest.param("mixture", "log-odds", tuple(MEDIATORS), marks=pytest.mark.slow),
    ],
)
def test_estimates_equal_a_plain_loop_of_gradients(kind: str, name: str, units: tuple[str, ...]) -> None:
    model, pair, points = tiny.model(kind), tiny.PAIRS[1], 3
    table = jm.sweep(model, [pair], name, units, "user_last", 4, method="integrated", points=points)
    (patch,) = align(render(model.tokenizer, pair, "base"), render(model.tokenizer, pair, "source"), "user_last")
    for unit in units:
        wanted = _slow(model, pair, patch, unit, points, name)
        found = table[unit].values[0].reshape(wanted.shape)
        assert np.abs(found - wanted).max() <= 1e-4 * max(float(np.abs(wanted).max()), 1e-2), unit


def test_a_layer_adds_up_to_the_exact_effect_of_its_modules(plain_model: Model) -> None:
    units, how = ("neuron", "head_out", "attention_out", "mlp_out"), {"position": "user_last", "outcome": ("log-odds", "kl")}
    exact, found = (
        jm.sweep(plain_model, tiny.PAIRS[:1], unit=units, method=method, points=MANY, **how) for method in ("exact", "integrated")
    )
    sums = {"mlp_out": found.neuron.sum("neuron_index", skipna=False), "attention_out": found.head_out.sum("head_index", skipna=False)}
    for unit, added in sums.items():
        scale = float(np.nanmax(np.abs(exact[unit].values)))
        for one in (found[unit], added.transpose(*found[unit].dims)):
            assert float(np.nanmax(np.abs((one - exact[unit]).values))) <= 1e-3 * scale, unit
    assert np.abs(found.source_outcome.values - exact.source_outcome.values).max() <= 1e-5


def test_reversed_between_models_the_other_model_is_restarted(plain_model: Model) -> None:
    other = from_params(
        plain_model.config, jax.tree.map(lambda x: x * 1.02, plain_model.params), plain_model.mesh, "other", tiny.tokenizer()
    )
    how: dict[str, Any] = {"contrast": "model", "source_model": other, "direction": "reverse", "unit": "mlp_out", "layers": (1,)}
    exact, found = (jm.sweep(plain_model, tiny.PAIRS[:1], method=method, **how).mlp_out.values[:, 1] for method in ("exact", "integrated"))
    assert np.abs(found - exact).max() <= 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("position", ["last", "each"])
def test_the_plan_counts_what_the_program_multiplies(position: str) -> None:
    """Of a model whose unembedding is small beside its blocks."""
    tiny.CONFIGS["wide"] = config = replace(tiny.LLAMA, layers=4, width=256, heads=4, head_width=64, neurons=512)
    request = Request(("log-odds",), ("neuron", "mlp_out"), position, layers=(1,), method="integrated", points=3)
    job = make_job(tiny.model("wide"), tiny.PAIRS[:1], request)
    contrast, params, readout = job.contrasts[0], job.model.params, Readout(request.outcomes, 1)
    estimator: Any = find_estimator("integrated")
    (item,) = estimator.items(job)
    rows, size, sites = batch_rows([contrast], 1), estimator.size(job, item), first_order.sites_of(request.units)
    pieces = list(points_of(shape_of(contrast).patches, request.points, size))

    def forwards(rows: Any) -> Any:
        written, *_ = first_order.run_source(config, params, rows, sites, readout)
        return first_order.run_base(config, params, rows, ("mlp_out",), readout), written

    def one(rows: Any, base: Any, written: Any, layer: Any) -> Any:
        return integrate(config, params, rows, base, written, layer, pieces[0], request.units, 32, readout)

    base, written = jax.eval_shape(forwards, rows)
    behind = count_flops(jax.make_jaxpr(one)(rows, base, written, np.int32(1)).jaxpr, trips=2)
    found = count_flops(jax.make_jaxpr(forwards)(rows).jaxpr) + len(pieces) * behind
    devices = job.model.mesh.shape["data"]
    assert plan(job).cost.flops / devices == pytest.approx(found, rel=0.1)


def test_an_item_begun_is_finished_layer_by_layer(plain_model: Model, tmp_path: Path) -> None:
    how: dict[str, Any] = {"unit": ("neuron", "attention_out"), "method": "integrated", "points": 2}
    whole = jm.sweep(plain_model, tiny.PAIRS[:1], **how, out=tmp_path / "run")
    table = results.Table(tmp_path / "run")
    table.mark_done(0, [1], 0)
    again = jm.sweep(plain_model, tiny.PAIRS[:1], **how, out=tmp_path / "run", resume=True)
    assert read_run(tmp_path / "run")["sessions"][-1]["passes"] < read_run(tmp_path / "run")["sessions"][0]["passes"]
    for name in ("neuron", "attention_out"):
        assert np.array_equal(whole[name].values, again[name].values)
    with pytest.raises(jm.UserError, match="another request"):
        jm.sweep(plain_model, tiny.PAIRS[:1], **{**how, "points": 3}, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("points", [0, 65])
def test_points_out_of_range_are_refused(plain_model: Model, points: int) -> None:
    with pytest.raises(jm.UserError, match="1 to 64"):
        jm.sweep(plain_model, tiny.PAIRS, method="integrated", points=points)
