"""Plans of exact sweeps of published shapes on 1 to 4,096 chips, calculated: nothing of it is run.

    python scripts/plan_table.py --into docs/results/plans.md

Every row is one pair: all neurons of all layers at the last token of a 64-token prompt, in bfloat16. The chunk's program is compiled for
the devices that share weights (at most 64, simulated); devices on "data" send each other nothing and are counted.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64 --xla_backend_optimization_level=0"

import jaxmed as jm
from jaxmed.bench.abstract import Compiled, compile_chunk, sweep_flops
from jaxmed.bench.shapes import SHAPES
from jaxmed.models.config import ModelConfig
from jaxmed.runs.watch import show_time

PROMPT, MOST_ROWS = 64, 8192
MATMULS, REACHED, MEMORY, NODE, NETWORK = 989e12, 0.6, 3.35e12, 450e9, 50e9
"""Of an H100 SXM by its data sheet: dense bfloat16 FLOP/s; the part that is assumed to be reached; bytes/s of memory, of NVLink within a
node of eight, and of a 400 Gb/s adapter between nodes."""
CORES = {"llama-3.2-1b": (1, 1), "llama-3.1-8b": (1, 1), "llama-3.1-70b": (4, 1), "llama-3.1-405b": (8, 4)}
"""Shape -> chips on tensor and fsdp: the fewest that leave half of 80 GB free."""
CHIPS = (1, 8, 64, 512, 4096)
COLUMNS = ("shape", "chips", "mesh", "rows per chip", "weights per chip", "compiler's peak", "without copies", "received per pair")
COLUMNS += ("matmuls", "weights", "links", "a pair", "1,000 pairs")
BEGIN, END = "<!-- table -->", "<!-- end -->"


@dataclass(frozen=True)
class Plan:
    """One row.

    Attributes:
        rows: of a chunk, per chip that has rows of its own.
        compute, weights, links: seconds of a pair if nothing else took any: matmuls, reading weights, receiving from other chips.
    """

    mesh: str
    rows: int
    compiled: Compiled
    received: float
    compute: float
    weights: float
    links: float

    @property
    def seconds(self) -> float:
        """Without any overlap of messages with the rest."""
        return max(self.compute, self.weights) + self.links


def make_plan(config: ModelConfig, tensor: int, fsdp: int, chips: int) -> Plan:
    """The plan of a pair on so many chips, as many as share weights or a multiple of that."""
    data = chips // (tensor * fsdp)
    parts = data * fsdp
    rows = min(MOST_ROWS, -(-config.neurons // parts))
    compiled = compile_chunk(config, jm.make_mesh(f"tensor={tensor},fsdp={fsdp}"), rows, PROMPT)
    chunks = -(-config.neurons // (rows * parts))
    layers = chunks * config.layers * (config.layers - 1) / 2
    received = layers * compiled.layer
    read = layers * 2 * config.layer_weights / tensor
    link = NODE if tensor * fsdp <= 8 else NETWORK
    flops = sweep_flops(config, PROMPT)
    mesh = f"data={data}, fsdp={fsdp}, tensor={tensor}"
    return Plan(mesh, rows, compiled, received, flops / (chips * MATMULS * REACHED), read / MEMORY, received / link)


def lines() -> list[str]:
    """The table."""
    found = ["| " + " | ".join(COLUMNS) + " |", "|---|--:|---|" + "--:|" * (len(COLUMNS) - 3)]
    for name, (tensor, fsdp) in CORES.items():
        config = replace(SHAPES[name], dtype="bfloat16")
        for chips in (count for count in CHIPS if count >= tensor * fsdp):
            one = make_plan(config, tensor, fsdp, chips)
            compiled = one.compiled
            sizes = [f"{size / 1e9:,.1f} GB" for size in (compiled.weights, compiled.peak, compiled.peak - compiled.copies, one.received)]
            times = [brief(seconds) for seconds in (one.compute, one.weights, one.links, one.seconds, 1000 * one.seconds)]
            found.append("| " + " | ".join([name, f"{chips:,}", one.mesh, f"{one.rows:,}", *sizes, *times]) + " |")
            print(found[-1], flush=True)
    return found


def brief(seconds: float) -> str:
    """Two figures, or words for what takes a minute or more."""
    if not seconds:
        return "0"
    return show_time(seconds) if seconds >= 60 else f"{seconds:.{max(0, 1 - math.floor(math.log10(seconds)))}f} s"


def write_table(page: Path) -> None:
    """Puts the table between the page's marks, and the date into the line before them."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{page} has no place for the table: two lines, {BEGIN!r} and {END!r}, are expected.")
    made = f"Calculated {date.today().isoformat()}."
    page.write_text("\n".join([before + BEGIN, made, "", *lines(), END + after]), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True, help="Markdown page with a place for the table")
    write_table(parser.parse_args().into)
