"""What a run will cost, before it begins: passes, FLOPs, bytes, programs, time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.axes import row_parts, row_sharding
from jaxmed.hosts import agree
from jaxmed.models.config import ModelConfig
from jaxmed.runs.watch import show_time

TOKENS_PER_DEVICE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Most row tokens of one chunk on one device: enough to keep the matmuls busy, little enough to stay in memory."""
MEMORY_SHARE = 0.15
"""Part of a device's memory that one chunk's activations may take."""


def units_per_device(config: ModelConfig, mesh: jax.sharding.Mesh, units: int, window: int, seen: int, logits: bool = False) -> int:
    """Chunk size: how many units each device takes at once. A function of shapes and device kind alone, so that a resumed run agrees.

    Args:
        units: units per layer (neurons, windows), or in all (modules).
        window: tokens carried per unit (window bucket).
        seen: tokens seen per unit (length bucket).
        logits: whether whole rows of logits are kept (Python outcomes).
    """
    device = mesh.local_devices[0]
    devices = row_parts(mesh)
    per_token = 4 * (
        2 * config.sizes["C"] * config.neurons + 8 * config.width + 2 * config.heads * seen + (config.vocabulary if logits else 0)
    )
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit", 8 << 30) * MEMORY_SHARE
    most = max(1, int(min(TOKENS_PER_DEVICE.get(device.platform, 2048), memory / per_token) // window))
    pieces = -(-units // (most * devices))
    size = -(-units // (pieces * devices))
    return size if size < 8 else -(-size // 8) * 8


PAIR_TOKENS = {"cpu": 512, "gpu": 8192, "tpu": 8192}
"""Most tokens of one batch of pairs on one device: beyond these, matmuls do not get faster."""


def pairs_per_device(config: ModelConfig, mesh: jax.sharding.Mesh, length: int, effects: int) -> int:
    """Batch size: how many pairs each device takes through the model at once, both ways. A function of shapes and device kind alone.

    Args:
        length: tokens of a row (length bucket).
        effects: effects per layer, times the tokens of a window.
    """
    device = mesh.local_devices[0]
    kept = config.width + 2 * config.kv_heads * config.head_width
    inside = 4 * config.sizes["C"] * config.neurons + 8 * config.width + 4 * config.heads * length
    memory = (device.memory_stats() or {}).get("bytes_limit", 8 << 30) * MEMORY_SHARE
    per_pair = 4 * (length * (config.layers * kept + inside) + 3 * config.layers * effects)
    return max(1, int(min(PAIR_TOKENS.get(device.platform, 512) // length, memory // per_pair)))


def propagate_flops(config: ModelConfig, rows: int, window: int, seen: int, layers: int, asked: int | None = None) -> float:
    """Multiply-adds times two of `layers` layers of `propagate`, matmuls of weights and attention (readout not included).

    Args:
        asked: tokens that the last layer runs for, where it has but keys and values for the others (`runner.are_few`); None: all.
    """
    attention = 4 * config.heads * config.head_width * (seen + window)
    whole = float(rows) * window * layers * (2 * config.layer_weights + attention)
    if asked is None or not layers:
        return whole
    joined = config.width * config.head_width * (config.heads + 2 * config.kv_heads)
    return whole - float(rows) * (window - asked) * (2 * (config.layer_weights - joined) + attention)


def backward_flops(config: ModelConfig, rows: int, window: int, seen: int, layers: int, outcomes: int) -> float:
    """FLOPs of the gradients of `outcomes` in the activations of `layers` layers, each of which is run again but for its down projection.

    Args:
        window: tokens of a row that gradients are taken at.
        seen: earlier tokens that they see, 0 without any; their keys and values have no gradient.
    """
    tokens, heads = float(rows) * window * layers, 4 * config.heads * config.head_width
    again = 2 * (config.layer_weights - config.width * config.neurons) + heads * (seen + window)
    return tokens * (again + outcomes * (2 * config.layer_weights + heads * seen + 2 * heads * window))


def count_flops(jaxpr: Any, trips: float = 1.0) -> float:
    """FLOPs of every `dot_general` of a jaxpr times the lengths of the loops around it.

    The compiler's own cost analysis counts a loop body once. `trips` stands for the length of loops whose bounds are traced.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), (batch, _) = equation.params["dimension_numbers"]
            left, right = (v.aval.shape for v in equation.invars)
            shared = math.prod(left[i] for i in (*contracting, *batch))
            kept = math.prod(left) // shared * math.prod(right)
            total += 2.0 * kept
            continue
        times = {"scan": equation.params.get("length", 1), "while": trips}.get(equation.primitive.name, 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * count_flops(inner, trips)
    return total


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes. Costs add up: `sum(costs, Cost("in all"))`.

    Attributes:
        title: what the work is, in words.
        flops: of matmuls.
        passes: runs of a model over one row.
        read, written: bytes from and to the disk.
        peak: most bytes on one device at once; of a sum the largest.
        programs: programs to compile.
    """

    title: str
    flops: float = 0.0
    passes: float = 0
    read: int = 0
    written: int = 0
    peak: int = 0
    programs: int = 0

    def __add__(self, other: Cost) -> Cost:
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("flops", "passes", "read", "written", "programs")}
        return Cost(self.title, peak=max(self.peak, other.peak), **sums)

    def line(self, rate: float | None = None) -> str:
        """The cost in one line; parts that are zero are left out. With `rate` in FLOP/s, the time too."""
        parts = [
            f"{self.passes:,.0f} passes" if self.passes else "",
            f"{self.flops / 1e12:,.2f} TFLOP of matmuls" if self.flops else "",
            f"{show_bytes(self.read)} read" if self.read else "",
            f"{show_bytes(self.written)} written" if self.written else "",
            f"at most {show_bytes(self.peak)} on a device" if self.peak else "",
            f"{self.programs} programs to compile" if self.programs else "",
            f"about {show_time(self.flops / rate)}" if rate and self.flops else "",
        ]
        return f"{self.title}: {', '.join(part for part in parts if part)}".removesuffix(": ")


def cost_lines(costs: Sequence[Cost], rate: float | None = None) -> list[str]:
    """Several costs and their sum, a line each."""
    total = sum(costs, Cost("in all"))
    return [cost.line(rate) for cost in costs] + ([total.line(rate)] if len(costs) > 1 else [])


def show_bytes(size: float) -> str:
    """Bytes as "12.3 MB" or "4.5 GB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def matmul_rate(config: ModelConfig, mesh: jax.sharding.Mesh, rows: int) -> float:
    """FLOP/s of the MLP's input projection at `rows` rows per device, over all devices of the mesh; takes about a second."""
    devices = row_parts(mesh)
    precision = "highest" if config.dtype == "float32" else None
    spec = row_sharding(mesh)
    x = jax.device_put(jnp.ones((devices * rows, config.width), config.compute), spec)
    w = jax.device_put(jnp.ones((config.width, config.sizes["C"] * config.neurons), config.compute), jax.NamedSharding(mesh, jax.P()))
    product = jax.jit(lambda x, w: jnp.matmul(x, w, precision=precision))
    product(x, w).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        product(x, w).block_until_ready()
        times.append(time.perf_counter() - begin)
    return agree(2.0 * x.shape[0] * w.shape[0] * w.shape[1] / sorted(times)[2])
