"""Other ways to sweep with the engine: many neurons patched together, and a screened sweep of a whole pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxmed.axes import row_parts
from jaxmed.bench.shapes import Subject
from jaxmed.effects.estimators import find_estimator
from jaxmed.effects.job import SETS_AT_ONCE, Job, with_method
from jaxmed.effects.joint import set_values
from jaxmed.effects.request import Request
from jaxmed.effects.sets import UnitSet, as_set
from jaxmed.runs.cost import propagate_flops

SETS, SET_SIZE, PAIRS = 1024, 32, 8
"""Joint sets of every layer, the neurons of each, and pairs of a screened sweep."""
JOINT, SCREENED = "joint sets of 32 neurons", "screened sweep of all neurons, table not written"


def joint(subject: Subject, sets: list[tuple[UnitSet, ...]]) -> np.ndarray:
    """Effects float32 [layer, set] of the sets of every layer, dispatched as a sweep does."""
    size = min(SETS_AT_ONCE, -(-SETS // row_parts(subject.model.mesh)))
    started = [set_values(subject.model, subject.window, rows, 1, size, subject.readout) for rows in sets]
    return np.stack([values.effects(SETS)[0][0] for values in started])


def random_sets(subject: Subject, layers: list[int]) -> list[tuple[UnitSet, ...]]:
    """SETS random sets of each layer, in which nothing of other layers is patched."""
    rng, neurons = np.random.default_rng(0), subject.model.config.neurons
    draw = lambda layer: [("neuron", layer, int(i)) for i in rng.choice(neurons, min(SET_SIZE, neurons), replace=False)]  # noqa: E731
    return [tuple(as_set(str(number), draw(layer)) for number in range(SETS)) for layer in layers]


def joint_flops(subject: Subject, layers: list[int]) -> float:
    """Matmul FLOPs of `joint`: a set runs from its own layer on, whose MLP sees the mask."""
    config = subject.model.config
    return sum(propagate_flops(config, SETS, 1, 0, config.layers - layer) for layer in layers)


def screened(subject: Subject) -> Callable[[], Any]:
    """Screened sweeps of PAIRS pairs, each the subject's, all neurons of all layers, with the default budget: their chunks of a table."""
    model, contrast = subject.model, subject.prepared.contrast
    request = Request(subject.readout.outcomes, ("neuron",), top=100)
    job = Job(model, (contrast.pair,) * PAIRS, request, tuple(range(model.config.layers)), (contrast,) * PAIRS)
    return partial(_run, with_method(job, "screened"))


def _run(job: Job) -> Any:
    estimator = find_estimator("screened")
    return [estimator.start(job, item, None)() for item in estimator.items(job)]


def contestants(
    subject: Subject, layers: list[int], timed: Callable[[Callable[[], Any]], float]
) -> dict[str, tuple[int, Callable[[], float]]]:
    """Name -> (units in a round, seconds of a round)."""
    sets, sweep = random_sets(subject, layers), screened(subject)
    return {
        JOINT: (len(layers) * SETS, lambda: timed(lambda: joint(subject, sets))),
        SCREENED: (PAIRS * subject.model.config.layers * subject.model.config.neurons, lambda: timed(sweep)),
    }
