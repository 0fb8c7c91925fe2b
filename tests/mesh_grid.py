"""A program of its own, for a process with eight CPU devices: one sweep, one fine-tuning step and scores on meshes of all shapes.

Arguments: kinds of blocks. Prints JSON: "kind mesh" -> {what: how far it is from one device}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import jaxmed as jm
from jaxmed.batching.scoring import score_responses
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.tokens import TokenizedExample
from tests import tiny

LLAMA = replace(tiny.LLAMA, layers=2, heads=8, kv_heads=8, head_width=4)
KINDS: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "mixture": replace(LLAMA, neurons=32, experts=8, experts_used=2, experts_normed=True),
}
SIZES = (1, 2, 4, 8)
GRID = tuple(f"data={d},fsdp={f},tensor={8 // d // f}" for d in SIZES for f in SIZES if d * f <= 8)
"""Every way to put eight devices on three axes in powers of two."""
RNG = np.random.default_rng(0)
TEXTS = [jm.Example(f"question {number}", "an answer") for number in range(8)]
EXAMPLES = [TokenizedExample(RNG.integers(1, 264, 12, np.int32), 4) for _ in range(8)]


def of_sweeps(model: Model) -> dict[str, Any]:
    """Exact effects of a pair, and estimates of two."""
    units = ("neuron", "head_out")
    exact = jm.sweep(model, tiny.PAIRS[:1], outcome=("prefix-gap", "kl"), unit=units)
    estimates = jm.sweep(model, tiny.PAIRS[:2], outcome="log-odds", unit=units, method="attribution")
    tables = {"exact": exact, "attribution": estimates}
    return {f"{name} {unit}": table[unit].values for name, table in tables.items() for unit in units}


def of_a_step(model: Model) -> dict[str, Any]:
    """Loss and gradient of a step of full fine-tuning, and parameters after it."""
    tuned = jm.finetune(model, TEXTS, method="full", steps=1, warmup=0, batch=8, learning_rate=1e-2, epsilon=1.0)
    params = tuned.model.params
    found = {"loss": np.asarray([[row["loss"], row["gradient_norm"]] for row in tuned.losses])}
    return (
        found
        | {f"tuned {name}": np.asarray(params["blocks"][name]) for name in ("qkv", "down")}
        | {"tuned head": np.asarray(params["head"])}
    )


def of_scores(model: Model) -> dict[str, Any]:
    """Log-probabilities of responses, and pruning scores of one matrix."""
    found = {"responses": np.concatenate([one.log_probabilities for one in score_responses(model, EXAMPLES)])}
    scores = jm.pruning.score(model, TEXTS, TEXTS[:4])
    name = next(name for name in scores.shapes if "down" in name or "w2" in name)
    return found | {f"pruning {which}": scores.read(which, name) for which in scores.kinds}


ALL = (of_sweeps, of_a_step, of_scores)


def numbers(kind: str, mesh: str, what: Iterable[Callable[[Model], dict[str, Any]]] = ALL) -> dict[str, Any]:
    """What is computed on a mesh, as arrays."""
    model = tiny.made(KINDS[kind], mesh, kind)
    return {name: array for part in what for name, array in part(model).items()}


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest difference of every array, as a part of the largest number where that is above one."""
    largest = lambda array: float(np.nanmax(np.abs(array)))  # noqa: E731
    return {name: largest(one[name] - array) / max(1.0, largest(array)) for name, array in other.items()}


def main() -> None:
    """The numbers of all meshes against those of one device."""
    found = {}
    for kind in sys.argv[1:]:
        what = ALL if kind == "llama" else (of_sweeps,)  # the rest has no more kinds of blocks
        alone = numbers(kind, "data=1", what)
        for mesh in GRID:
            jax.clear_caches()
            found[f"{kind} {mesh}"] = apart(numbers(kind, mesh, what), alone)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
