"""One pass over a set of examples: totals of a span of layers, and the scores that they give."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_sharding
from jaxmed.batching.one_per_row import batches
from jaxmed.batching.texts import response_tokens
from jaxmed.models.model import Model
from jaxmed.models.named_weights import inputs_axis, named_layers
from jaxmed.models.params import Params
from jaxmed.pruning.job import Job
from jaxmed.pruning.totals import add_batch, fresh_totals, total_shardings
from jaxmed.runs import signals
from jaxmed.runs.watch import Watch


def run_pass(job: Job, which: str, span: tuple[int, int], report: Watch) -> tuple[Params, float]:
    """The totals [layers, ...] of one span over one set, and the mean loss."""
    model, plan, examples = job.model, job.plans[which], job.sets[which]
    placed, kinds = row_sharding(model.mesh), job.kinds_of(which)
    make = partial(fresh_totals, model.config, kinds, span[1] - span[0], model.mesh.shape["data"])
    totals, losses = jax.jit(make, out_shardings=total_shardings(model.config, kinds, model.mesh))(), 0.0
    for members, batch in batches(examples, plan.groups):
        on_devices = jax.device_put((batch, response_tokens(batch)), placed)
        totals, loss = add_batch(model.config, model.params, totals, *on_devices, span, plan.remat, model.mesh)
        losses += float(np.asarray(loss).sum())
        report(1, len(members), which)
        signals.check()
    return jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.sum(0), tree))(totals), losses / len(examples)


def scores_of(model: Model, totals: Params, first: int, responses: int) -> dict[str, Any]:
    """kind -> (matrix, scores) of every matrix, one layer on the host at a time.

    Args:
        totals: of `run_pass`.
        first: layer that they begin with.
        responses: tokens of all responses.
    """
    config = model.config
    layers = slice(first, first + next(iter(jax.tree.leaves(totals))).shape[0])

    def weighted(kind: str) -> Any:
        weights = named_layers(config, {name: model.params["blocks"][name][layers] for name in totals}, first)
        for (name, weight), (_, total) in zip(weights, named_layers(config, {n: t[kind] for n, t in totals.items()}, first), strict=True):
            weight = weight.astype(np.float32)
            yield name, (np.abs(weight) if kind == "absolute" else weight) * total

    def inputs() -> Any:
        wide = {}
        for name, of_kind in totals.items():
            mean = jnp.sqrt(of_kind["inputs"] / responses)
            shape = (mean.shape[0], *model.params["blocks"][name].shape[1:])
            wide[name] = jnp.broadcast_to(mean.reshape(*mean.shape, *[1] * (len(shape) - mean.ndim)), shape)
        axis = inputs_axis(config)
        for name, array in named_layers(config, wide, first):
            yield name, np.ascontiguousarray(array.take(0, 1 - axis))

    kinds = next(iter(totals.values()))
    return {kind: inputs() if kind == "inputs" else weighted(kind) for kind in kinds}
