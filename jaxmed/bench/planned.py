"""What plans promise against what the work then takes, in one run."""

from __future__ import annotations

import datetime
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jaxmed.axes import row_parts
from jaxmed.cache.job import make_job as make_cache
from jaxmed.cache.run import run_shards
from jaxmed.distributed import device_name
from jaxmed.effects.cost import plan
from jaxmed.effects.job import estimate_rate, make_job, with_method
from jaxmed.effects.request import Request
from jaxmed.effects.sweep import run_sweep
from jaxmed.files import write_text
from jaxmed.finetuning import job as tuning
from jaxmed.finetuning.run import run_job as tune
from jaxmed.finetuning.settings import make_settings
from jaxmed.models.model import Model
from jaxmed.prompts import read_pairs
from jaxmed.prompts.examples import chosen
from jaxmed.pruning import job as scoring
from jaxmed.pruning.scores import run_job as score
from jaxmed.runs.cost import matmul_rate
from jaxmed.runs.provenance import short_commit

NEAR = 0.25
"""By how much a measured time may differ from the planned one, as a part of it."""


@dataclass(frozen=True)
class Case:
    """Work with a plan.

    Attributes:
        flops: what the plan counts.
        rate: the rate that the command's plan takes, in FLOP/s; measured when it is called.
        run: does the work, in a folder of its own.
    """

    name: str
    flops: float
    rate: Callable[[], float]
    run: Callable[[Path], Any]


def make_cases(model: Model) -> list[Case]:
    """A little of every kind of long work: some seconds each on two cores for the default model."""
    some = _spread(model, 6)
    modules = Request(units=("attention_out", "mlp_out"), position="each", layers=some)
    return [
        _sweep(model, "sweep of all neurons of six layers, one pair", Request(units=("neuron",), layers=some), 1),
        _sweep(model, "sweep of modules of six layers at every token, one pair", modules, 1),
        _sweep(model, "estimates of all neurons, 16 pairs", Request(units=("neuron",)), 16, "attribution"),
        _scores(model),
        _tuning(model),
        _activations(model),
    ]


def _spread(model: Model, count: int) -> tuple[int, ...]:
    layers = model.config.layers
    return tuple(sorted({at * layers // count for at in range(count)}))


def _sweep(model: Model, name: str, request: Request, pairs: int, method: str = "exact") -> Case:
    job = with_method(make_job(model, read_pairs("harm")[:pairs], request), method)
    return Case(name, plan(job).cost.flops, lambda: estimate_rate(job), lambda out: run_sweep(job, out / "run"))


def _scores(model: Model) -> Case:
    rows = [chosen(name, "train", 12) for name in ("rude", "ordinary")]
    job = scoring.make_job(model, *rows)
    shape = next(iter(job.plans.values())).groups[-1].shape
    size = shape.rows * shape.length // row_parts(model.mesh)
    flops = sum(one.flops for one in job.plans.values())
    return Case(
        "scores of weights, 24 examples", flops, lambda: matmul_rate(model.config, model.mesh, size), lambda out: score(job, out / "run")
    )


def _tuning(model: Model) -> Case:
    job = tuning.make_job(model, chosen("rude", "train", 32), settings=make_settings(batch=8, steps=4))
    size = job.shape.rows * job.shape.length // row_parts(model.mesh)
    rate = lambda: matmul_rate(model.config, model.mesh, size)  # noqa: E731
    return Case("fine-tuning by LoRA, four steps of eight examples", tuning.total_flops(job), rate, lambda out: tune(job))


def _activations(model: Model) -> Case:
    prompts = [pair.base for pair in read_pairs("harm")[:48]]
    job = make_cache(model, prompts, ("residual_out",), "last", "chat")
    rate = lambda: matmul_rate(model.config, model.mesh, 512)  # noqa: E731
    return Case("activations of 48 prompts", job.cost().flops, rate, lambda out: list(run_shards(job, [range(len(job.rows))])))


def measure_plans(model: Model, rounds: int, append: Path | None = None) -> dict[str, tuple[float, float]]:
    """Runs every case in every round, after a round that compiles and is not counted; prints and returns medians.

    Returns:
        Case -> (planned seconds, measured over planned), medians over rounds; the plan is made right before the work.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for case in make_cases(model):
        for number in range(rounds + 1):
            with tempfile.TemporaryDirectory() as scratch:
                planned = case.flops / case.rate()
                begun = time.perf_counter()
                case.run(Path(scratch))
                if number:
                    found.setdefault(case.name, []).append((planned, (time.perf_counter() - begun) / planned))
    medians = {name: (median(planned for planned, _ in held), median(ratio for _, ratio in held)) for name, held in found.items()}
    lines = [f"{name}: planned {planned:.2f} s, took {ratio:.2f} x that" for name, (planned, ratio) in medians.items()]
    far = [name for name, (_, ratio) in medians.items() if abs(ratio - 1) > NEAR]
    lines.append(f"{len(medians) - len(far)} of {len(medians)} within {NEAR:.0%} of their plans")
    print("\n".join(lines))
    if append is not None:
        title = f"\n## {datetime.date.today()}, commit {short_commit()}, plans of {model.name}, {device_name(model.mesh)}\n\n"
        about = f"`jaxmed {' '.join(sys.argv[1:])}`\n\nMedians of {rounds} rounds, after one that compiles.\n\n"
        text = append.read_text(encoding="utf-8") if append.exists() else "# Benchmarks\n"
        write_text(append, text + title + about + "".join(f"- {line}\n" for line in lines))
    return medians
