"""How a scoring pass is cut so that it fits: layers per pass, rows per batch, whether blocks run again; and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxmed.axes import row_parts
from jaxmed.batching.batches import Shape
from jaxmed.batching.one_per_row import Group, count_batches, group
from jaxmed.errors import UserError
from jaxmed.memory import host_bytes
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import param_shapes
from jaxmed.runs.cost import TOKENS_PER_DEVICE
from jaxmed.tokens import TokenizedExample

HOST_PART = 0.5
"""Part of the host's memory that its devices are given, where they have none of their own: the rest is for what other programs, results
and the files that are read take."""
USED = 0.92
"""Part of a device's memory that a plan may fill."""
PARTS = (1, 2, 4, 8, 16)
"""By how much batches may be smaller than those that keep the matmuls busy, where that saves a pass."""
REMAT = 4 / 3
"""What blocks that run again cost, over those that do not: one more forward beside three."""


@dataclass(frozen=True)
class Plan:
    """How one set is scored.

    Attributes:
        spans: layers [first, stop) of every pass over the set.
        groups: its batches.
        remat: whether blocks run again for their gradients.
        bytes: most memory on a device.
        flops: matmul FLOPs in all, without what remat repeats.
    """

    spans: tuple[tuple[int, int], ...]
    groups: list[Group]
    remat: bool
    bytes: int
    flops: float

    @property
    def batches(self) -> int:
        """Of one pass."""
        return count_batches(self.groups)

    def with_spans(self, spans: Sequence[Sequence[int]]) -> Plan:
        """The plan with other passes, where these are of all layers one after another; else the plan as it is."""
        begun = tuple((int(first), int(stop)) for first, stop in spans)
        ends = [0, *(stop for _, stop in begun)]
        tiled = ends == [*(first for first, _ in begun), self.spans[-1][1]]
        return replace(self, spans=begun) if tiled else self


def make_plan(
    model: Model,
    examples: Sequence[TokenizedExample],
    kinds: Sequence[str],
    rows: int = 0,
    layers_per_pass: int = 0,
    remat: bool | None = None,
) -> Plan:
    """The cheapest plan that fits the memory of a device: smaller batches cost less than further passes.

    Args:
        rows: examples per device and batch; 0: as many as keep the matmuls busy.
        layers_per_pass: layers scored in one pass; 0: as many as fit.
        remat: None: only where it is needed to fit.

    Raises:
        UserError: values out of range.
    """
    config, mesh = model.config, model.mesh
    if rows < 0 or layers_per_pass < 0 or layers_per_pass > config.layers:
        raise UserError(f"rows ({rows}) is not negative, layers_per_pass ({layers_per_pass}) is from 0 to {config.layers}.")
    device = mesh.local_devices[0]
    limit = USED * device_bytes(device)
    most = TOKENS_PER_DEVICE.get(device.platform, 2048)
    grouped = [group(examples, row_parts(mesh), most // part, rows) for part in ((1,) if rows else PARTS)]
    wanted = [layers_per_pass] if layers_per_pass else [-(-config.layers // parts) for parts in range(1, config.layers + 1)]
    choices = [
        _cut(model, groups, kinds, layers, again)
        for groups in grouped
        for layers in dict.fromkeys(wanted)
        for again in ((False, True) if remat is None else (remat,))
    ]
    fitting = [plan for plan in choices if plan.bytes <= limit]
    if not fitting:
        return min(choices, key=lambda plan: plan.bytes)

    def cost(plan: Plan) -> float:
        """FLOPs of its passes in the largest batches: of plans that are alike in this, the first one is taken."""
        return math.fsum(_flops(config, grouped[0], span) for span in plan.spans) * (REMAT if plan.remat else 1.0)

    return min(fitting, key=cost)


def device_bytes(device: Any) -> float:
    """Memory of a device: what it says, or its share of the host's."""
    own = (device.memory_stats() or {}).get("bytes_limit")
    return own or HOST_PART * host_bytes() / len(jax.local_devices(backend=device.platform))


def _cut(model: Model, groups: list[Group], kinds: Sequence[str], layers: int, again: bool) -> Plan:
    """The plan with so many layers per pass, whatever it takes."""
    config, mesh = model.config, model.mesh
    size = max(pass_bytes(config, mesh, one.shape, kinds, layers, again) for one in groups)
    spans = tuple((first, min(first + layers, config.layers)) for first in range(0, config.layers, layers))
    return Plan(spans, groups, again, int(size), math.fsum(_flops(config, groups, span) for span in spans))


def pass_bytes(config: ModelConfig, mesh: jax.sharding.Mesh, shape: Shape, kinds: Sequence[str], layers: int, remat: bool) -> float:
    """Most memory on one device: weights, totals before and after a batch, activations kept for the gradients, logits."""
    split, rows = mesh.shape["tensor"] * mesh.shape["fsdp"], shape.rows // row_parts(mesh)
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(param_shapes(config))) / split
    part = 0 if layers == config.layers else weights  # blocks outside the span are copied
    totals = 2 * 4 * layers * config.layer_weights * len({"signed", "absolute"} & set(kinds)) / split
    tokens = rows * shape.length
    size = 4 if config.dtype == "float32" else 2
    heads = (config.heads + 2 * config.kv_heads) * config.head_width
    inner = config.sizes["C"] * config.neurons + config.neurons + 2 * config.width + 2 * heads
    kept = tokens * (4 * 2 * config.width + size * inner)
    scores = 4 * rows * config.heads * shape.length**2
    activations = config.layers * tokens * 4 * config.width + 2 * kept + 4 * scores if remat else config.layers * kept + 4 * scores
    logits = 3 * 4 * rows * shape.scored * config.vocabulary
    largest = 3 * 4 * config.layer_weights / mesh.shape["tensor"]  # gradients of one example
    return weights + part + totals + activations + logits + largest


def _flops(config: ModelConfig, groups: Sequence[Group], span: tuple[int, int]) -> float:
    """Of one pass: forward, back to the first layer of the span, gradients of its weights; the unembedding twice."""
    found = 0.0
    for one in groups:
        batches, shape = -(-len(one.members) // one.shape.rows), one.shape
        tokens = shape.rows * shape.length
        weights = 2.0 * tokens * config.layer_weights
        attention = 4.0 * tokens * shape.length * config.heads * config.head_width
        passed, scored = config.layers - span[0], span[1] - span[0]
        unembed = 2.0 * shape.rows * shape.scored * config.vocabulary * config.width
        found += batches * (config.layers * (weights + attention) + passed * (weights + 3 * attention) + scored * weights + 2 * unembed)
    return found
