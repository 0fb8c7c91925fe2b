"""What circuits take: pairs per batch, circuits per chunk, and FLOPs, counted from the programs themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.axes import row_parts
from jaxmed.circuits.faithfulness import circuit_outcomes, one_pair
from jaxmed.circuits.job import CircuitJob
from jaxmed.circuits.kept import is_kept
from jaxmed.circuits.rows import RowShape, batch_of, readout_of
from jaxmed.circuits.scores import point_scores, run_ends
from jaxmed.models.params import param_shapes
from jaxmed.runs.cost import MEMORY_SHARE, Cost, count_flops

BATCH_TOKENS = {"cpu": 512}
"""Most tokens of one batch of pairs on one device, where it is no accelerator."""
AT_ONCE = 64
"""Most circuits of one chunk on one device."""


@dataclass(frozen=True)
class Sizes:
    """Sizes and FLOPs of a job's programs."""

    job: CircuitJob

    @property
    def devices(self) -> int:
        return row_parts(self.job.model.mesh)

    def batches(self) -> list[tuple[list[int], int]]:
        """The pairs that are scored, in batches of equal shapes, and the rows of each batch's programs."""
        by_shape: dict[RowShape, list[int]] = {}
        for pair in self.job.scored:
            by_shape.setdefault(self.job.shape(pair), []).append(pair)
        found = []
        for shape, pairs in by_shape.items():
            size = _even(len(pairs), self._batch(shape) * self.devices)
            rows = -(-size // self.devices) * self.devices
            found += [(pairs[at : at + size], rows) for at in range(0, len(pairs), size)]
        return found

    def _batch(self, shape: RowShape) -> int:
        """Most pairs per device."""
        config, device = self.job.model.config, self.job.model.mesh.devices.flat[0]
        kept = 8 * shape.length * config.layers * (config.kv_heads * config.head_width + 2 * config.width)
        return max(1, min(BATCH_TOKENS.get(device.platform, 8192) // shape.length, self._fitting(self.bytes(shape) + kept)))

    def chunk(self, shape: RowShape, count: int) -> int:
        """Circuits per chunk of a shape, over all devices, where `count` are run."""
        most = max(1, min(AT_ONCE, self._fitting(self.bytes(shape)))) * self.devices
        return -(-_even(count, most) // self.devices) * self.devices

    def bytes(self, shape: RowShape) -> int:
        """What one pair, or one circuit, takes on a device: what all nodes write, twice, and the inputs of a layer."""
        config, graph = self.job.model.config, self.job.graph
        streams = (2 * len(graph.senders) + 6 * graph.per_layer) * config.width
        inside = 4 * config.sizes["C"] * config.neurons
        return 4 * (shape.window * (streams + inside) + 2 * len(graph.senders) * len(graph.receivers))

    def _fitting(self, each: int) -> int:
        stats = self.job.model.mesh.devices.flat[0].memory_stats() or {}
        return int(stats.get("bytes_limit", 8 << 30) * MEMORY_SHARE / each)

    @cached_property
    def flops(self) -> dict[RowShape, tuple[float, float, float]]:
        """By shape: matmul FLOPs of a pair's two runs, of its scores at one point, and of one circuit."""
        one_of = {self.job.shape(pair): pair for pair in range(len(self.job.pairs))}
        return {shape: _flops(self.job, pair) for shape, pair in one_of.items()}

    def of_scores(self, pair: int) -> float:
        """FLOPs of one pair's scores by all methods."""
        runs, point, _ = self.flops[self.job.shape(pair)]
        return runs + len(self.job.parts) * point

    def of_circuits(self, pair: int) -> float:
        """FLOPs of all circuits on one pair."""
        shape = self.job.shape(pair)
        runs, _, circuit = self.flops[shape]
        return runs * self.devices + self.padded(shape) * circuit

    def padded(self, shape: RowShape) -> int:
        """Circuits that a pair runs, those that fill the last chunk included."""
        size = self.chunk(shape, self.job.circuits)
        return -(-self.job.circuits // size) * size

    def costs(self, out: Path | None = None) -> list[Cost]:
        """What scoring takes, and what running circuits takes; what a run in `out` has finished is not counted again."""
        job, points = self.job, len(self.job.parts)
        left = [
            [pair for pair in pairs if out is None or not is_kept(out, f"{name}-{pair}")]
            for name, pairs in (("scores", job.scored), ("circuits", job.measured))
        ]
        scored, measured = ([job.shape(pair) for pair in pairs] for pairs in left)
        score = Cost("scores of all edges", sum(map(self.of_scores, left[0])), len(scored) * (2 + 2 * points))
        score = replace(score, programs=(1 + (points > 0)) * len(set(scored)), written=4 * len(scored) * job.graph.real.size)
        run = Cost("circuits", sum(map(self.of_circuits, left[1])), len(measured) * (2 + job.circuits))
        peak = max((self.bytes(shape) * self.chunk(shape, job.circuits) // self.devices for shape in measured), default=0)
        return [score, replace(run, programs=2 * len(set(measured)), peak=peak)]


def _even(count: int, most: int) -> int:
    """The size of pieces of `count` things, at most `most` each, as equal as can be."""
    return -(-count // -(-count // most))


def _flops(job: CircuitJob, pair: int) -> tuple[float, float, float]:
    """Counted from the jaxprs of the three programs, of one pair and one circuit."""
    config, shape, readout = job.model.config, job.shape(pair), readout_of(job.model, job.outcome)
    params, rows = param_shapes(config), batch_of([job.contrasts[pair]], 1)
    runs = partial(run_ends, config, window=shape.window, readout=readout)
    ends: Any = jax.eval_shape(runs, params, rows)
    single = jax.eval_shape(partial(one_pair, row=0), ends, rows.reads)
    circuit = jax.ShapeDtypeStruct((1, *job.graph.real.shape), jnp.bool_)
    programs = (
        (runs, (params, rows)),
        (partial(point_scores, config, readout=readout), (params, rows, ends, jax.ShapeDtypeStruct((), jnp.float32))),
        (partial(circuit_outcomes, config, readout=readout), (params, single, circuit)),
    )
    counted = [count_flops(jax.make_jaxpr(program)(*operands).jaxpr) for program, operands in programs]
    return counted[0], counted[1], counted[2]
