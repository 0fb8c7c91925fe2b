"""What an exact sweep of published shapes takes on many devices, without weights and without those devices.

The restarted run is compiled for a mesh of simulated devices from shapes alone. Memory per device is the compiler's own analysis; what
devices send each other is read from the compiled program.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_parts, row_sharding, vocabulary_parts
from jaxmed.effects.readout import Readout, Reads
from jaxmed.interventions.edits import TokenIndex
from jaxmed.models.config import ModelConfig
from jaxmed.models.params import param_shapes, param_shardings
from jaxmed.runner import Layout, Prefix, Restart, propagate
from jaxmed.runs.cost import propagate_flops

OUTCOMES, ANSWERS = ("log-odds",), 8
"""What is read, and the tokens that it reads."""
COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
Collective = tuple[str, list[tuple[str, int]]]
"""(kind, (number format, numbers) of every array)."""


def collectives(text: str | None) -> dict[str, list[Collective]]:
    """The collectives of a compiled program, those in loops ("inside") apart from all others ("outside")."""
    assert text is not None
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            lines[line.removeprefix("ENTRY ").split(" ")[0]] = own = []
        elif lines:
            own.append(line)
    calls = {name: {other for line in held for other in re.findall(r"%[\w.-]+", line) if other in lines} for name, held in lines.items()}
    looped = {other for held in lines.values() for line in held for other in re.findall(r"body=(%[\w.-]+)", line)}
    while more := {other for name in looped for other in calls[name]} - looped:
        looped |= more
    found: dict[str, list[Collective]] = {"inside": [], "outside": []}
    for name, held in lines.items():
        for line in held:
            if is_one := COLLECTIVE.search(line):
                sizes = [(kind, int(np.prod([int(n) for n in dims.split(",") if n]))) for kind, dims in SHAPE.findall(is_one[1])]
                found["inside" if name in looped else "outside"].append((is_one[2], sizes))
    return found


@dataclass(frozen=True)
class Compiled:
    """A chunk's program.

    Attributes:
        weights, peak: bytes on one device: parameters alone; and everything, temporary arrays included.
        copies: of the peak, float32 copies of the blocks' bfloat16 matrices, which a CPU's compiler makes and an accelerator's does not.
        layer, ends: bytes that a device gets from others in every layer, and before and after all layers.
    """

    weights: int
    peak: int
    copies: int
    layer: int
    ends: int


def compile_chunk(config: ModelConfig, mesh: jax.sharding.Mesh, rows: int, prompt: int) -> Compiled:
    """A chunk of `rows` rows per device, each of one token behind `prompt` cached ones, from any layer on.

    The caches' heads are split as the model's are, where they divide.
    """
    everywhere = jax.NamedSharding(mesh, jax.P())
    sharded = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    params = jax.tree.map(sharded, param_shapes(config), param_shardings(config, mesh))
    heads = jax.P(None, None, None, "tensor") if config.kv_heads % mesh.shape["tensor"] == 0 else jax.P()
    cached = jax.ShapeDtypeStruct(
        (config.layers, 1, prompt, config.kv_heads, config.head_width), config.compute, sharding=jax.NamedSharding(mesh, heads)
    )
    whole = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)  # noqa: E731
    prefix = Prefix(cached, cached, whole((1, prompt), jnp.int32), whole((1, prompt), jnp.bool_))
    layout = Layout(whole((1, 1), jnp.int32), whole((1, 1, 1), jnp.bool_), TokenIndex(whole((1, 1), jnp.int32), whole((1,), jnp.int32)))
    slots = whole((1,), jnp.int32)
    tokens = whole((ANSWERS,), jnp.int32)
    reads = Reads(slots, tokens, tokens, whole((1, ANSWERS), jnp.float32), whole((0,), jnp.float32))
    stream = jax.ShapeDtypeStruct((rows * row_parts(mesh), 1, config.width), jnp.float32, sharding=row_sharding(mesh))
    how = {"reads": reads, "asked": slots, "readout": Readout(OUTCOMES, vocabulary_parts(mesh))}
    lowered: Any = propagate.lower(config, params, Restart(prefix, layout), stream, whole((), jnp.int32), **how)  # type: ignore[attr-defined]
    program = lowered.compile()
    memory, sent = program.memory_analysis(), collectives(program.as_text())
    weights, blocks = _local_bytes(params), _local_bytes(params["blocks"])
    unread = _local_bytes(params["embedding"]) if "head" in params else 0  # the program does not have it, the device does
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes + unread
    number = jnp.dtype(config.dtype).itemsize
    copies = 2 * blocks if number == 2 and jax.default_backend() == "cpu" else 0
    return Compiled(weights, peak, copies, _bytes(sent["inside"], number), _bytes(sent["outside"], number))


def _local_bytes(params: Any) -> int:
    """Of one device."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _bytes(found: list[Collective], weight: int) -> int:
    """Bytes of collectives; gathered weights have `weight` bytes each: a CPU's compiler turns bfloat16 to float32 before it gathers."""
    return sum((weight if kind == "all-gather" else BYTES[number]) * count for kind, sizes in found for number, count in sizes)


def sweep_flops(config: ModelConfig, prompt: int) -> float:
    """Matmul FLOPs of all neurons of a pair at its last token: the restarted runs, each from its own layer on, and the two forwards."""
    rows = sum(propagate_flops(config, config.neurons, 1, prompt, config.layers - layer - 1) for layer in range(config.layers))
    return rows + 2 * propagate_flops(config, 1, prompt, 0, config.layers)
