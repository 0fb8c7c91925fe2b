"""One run in which all contestants alternate; medians, ratios, and rows for BENCHMARKS.md."""

from __future__ import annotations

import datetime
import statistics as medians
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxmed.bench import sweeps
from jaxmed.bench.contestants import bare_matmuls, engine, naive
from jaxmed.bench.peers import Peers
from jaxmed.bench.rows import add_rows
from jaxmed.bench.shapes import Subject, make_subject
from jaxmed.distributed import device_name
from jaxmed.files import write_json
from jaxmed.runs import watch
from jaxmed.runs.cost import propagate_flops
from jaxmed.runs.provenance import short_commit

NAIVE_NEURONS = 64
"""How many neurons the slow contestants patch per round; their cost per neuron does not depend on the number."""


OURS = ("engine", "bare matmuls", sweeps.JOINT, sweeps.SCREENED)


def bench(command: Any) -> dict[str, Any]:
    """Runs the benchmark that a `Bench` command describes, prints it, and returns every number."""
    subject = make_subject(command.load, command.shape, command.random_weights, command.dtype, command.tokens)
    layers = list(command.layers or range(subject.model.config.layers))
    middle = layers[len(layers) // 2]
    peers = Peers(subject, command.shape) if command.peers else None
    contestants: dict[str, tuple[int, Callable[[], float]]] = {
        "engine": (len(layers) * subject.model.config.neurons, lambda: _timed(lambda: engine(subject, layers))),
        "bare matmuls": (
            len(layers) * subject.model.config.neurons,
            lambda: _timed(lambda: jax.block_until_ready(bare_matmuls(subject, layers))),
        ),
        **sweeps.contestants(subject, layers, _timed),
    }
    if command.peers:
        contestants["naive jax, vmapped full forwards"] = (NAIVE_NEURONS, lambda: _timed(lambda: naive(subject, middle, NAIVE_NEURONS)))
    if peers is not None:
        contestants |= peers.contestants(layers, middle)
    try:
        times = _alternate(contestants, command.repeats)
        agreement = peers.agreement(subject, middle) if peers is not None else None
    finally:
        if peers is not None:
            peers.close()
    found = _result(subject, layers, contestants, times, agreement)
    _show(found)
    if command.json:
        write_json(command.json, found)
    if command.append:
        append(command.append, found)
    return found


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _alternate(contestants: dict[str, tuple[int, Callable[[], float]]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; a first round of each, not counted, compiles."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        for name, (_, work) in contestants.items():
            seconds = work()
            watch.err.print(f"round {number} {name}: {seconds:.3f} s{' (compiles; not counted)' if not number else ''}", markup=False)
            if number:
                times[name].append(seconds)
    return times


def _result(
    subject: Subject, layers: list[int], contestants: Any, times: dict[str, list[float]], agreement: float | None
) -> dict[str, Any]:
    config = subject.model.config
    flops = sum(propagate_flops(config, config.neurons, 1, 0, config.layers - 1 - layer) for layer in layers)
    rates = {name: contestants[name][0] / medians.median(seconds) for name, seconds in times.items()}
    ratio = lambda name: medians.median(a / b for a, b in zip(times[name], times["engine"], strict=True))  # noqa: E731
    share = {name: contestants["engine"][0] / contestants[name][0] for name in times}
    return {
        "command": "jaxmed " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "commit": short_commit(),
        "device": device_name(subject.model.mesh),
        "jax": jax.__version__,
        "model": subject.model.name,
        "dtype": config.dtype,
        "tokens": len(subject.base),
        "layers": layers,
        "units_per_device": subject.per_device,
        "seconds": times,
        "neurons_per_second": rates,
        "engine_over_bare_matmuls": ratio("bare matmuls"),
        "gflops": {name: flops / medians.median(times[name]) / 1e9 for name in ("engine", "bare matmuls")},
        "joint_sets_over_engine": sweeps.joint_flops(subject, layers) / flops / ratio(sweeps.JOINT),
        "screened_over_engine": 1 / (share[sweeps.SCREENED] * ratio(sweeps.SCREENED)),
        "speed_up": {name: share[name] * ratio(name) for name in times if name not in OURS},
        "largest_difference_from_hooks": agreement,
    }


def _lines(found: dict[str, Any]) -> list[str]:
    gflops = found["gflops"]
    lines = [
        f"{found['model']}, {found['dtype']}, {found['tokens']} tokens, {len(found['layers'])} layers, on {found['device']}",
        f"engine: {found['neurons_per_second']['engine']:,.0f} neurons/s, {gflops['engine']:,.0f} GFLOP/s; bare matmuls: "
        f"{gflops['bare matmuls']:,.0f} GFLOP/s; ratio {found['engine_over_bare_matmuls']:.3f} (median of rounds)",
    ]
    rates, joint, screened = found["neurons_per_second"], found["joint_sets_over_engine"], found["screened_over_engine"]
    lines += [
        f"{sweeps.JOINT}: {rates[sweeps.JOINT]:,.0f} sets/s; {joint:.2f} x the FLOP/s of single neurons",
        f"{sweeps.SCREENED}: {rates[sweeps.SCREENED]:,.0f} neurons/s; {screened:.1f} x as fast as the engine",
    ]
    for name, ratio in found["speed_up"].items():
        lines.append(f"{name}: {found['neurons_per_second'][name]:,.1f} neurons/s; the engine is {ratio:,.2f} x as fast")
    if found["largest_difference_from_hooks"] is not None:
        lines.append(f"largest difference from forward hooks in PyTorch: {found['largest_difference_from_hooks']:.1e}")
    return lines


def _show(found: dict[str, Any]) -> None:
    watch.lines("benchmark", _lines(found))


def append(file: Path, found: dict[str, Any]) -> None:
    """Adds one dated section with every number that was printed."""
    rows = "\n".join(f"| {name} | {rate:,.1f} |" for name, rate in found["neurons_per_second"].items())
    section = (
        f"\n## {found['date']}, commit {found['commit']}, {found['device']}, jax {found['jax']}\n\n"
        f"`{found['command']}`\n\n"
        + "".join(f"- {line}\n" for line in _lines(found))
        + f"\n| contestant | neurons/s |\n|---|---|\n{rows}\n"
    )
    add_rows(file, section)
