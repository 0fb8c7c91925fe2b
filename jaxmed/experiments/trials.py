"""The one loop of experiments: models are made one after another, measured, and kept as rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jaxmed.experiments.measure import Measurement, Tests, measure
from jaxmed.experiments.table import Table
from jaxmed.files import Row
from jaxmed.memory import return_freed_memory
from jaxmed.models.model import Model
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.selection import random_like


@dataclass(frozen=True)
class Trial:
    """One model that is measured.

    Attributes:
        key: values of the table's key columns.
        make: returns the model; called where the table has no such row yet.
        about: further columns of its row, which need no model.
    """

    key: tuple[Any, ...]
    make: Callable[[], Model]
    about: Mapping[str, Any] = field(default_factory=dict)


def run_trials(trials: Iterable[Trial], measure: Callable[[Trial, Model], Row], table: Table) -> Table:
    """Measures every trial that the table does not hold, and keeps its row: key, `about`, and what `measure` returns."""
    for trial in trials:
        if not table.has(*trial.key):
            model = trial.make()
            table.add({**dict(zip(table.key, trial.key, strict=True)), **trial.about, **measure(trial, model)})
            del model  # before the next one is made
            return_freed_memory()
    return table


def mask_trial(model: Model, key: tuple[Any, ...], mask: Mask, about: Mapping[str, Any] | None = None) -> Trial:
    """The trial of a model pruned by a mask; an empty mask leaves the model as it is."""
    counts = {"weights": mask.count, "fraction": mask.count / mask.size}
    return Trial(key, lambda: apply_mask(model, mask) if mask.count else model, {**(about or {}), **counts})


def beside_random(masks: Mapping[str, Mask], seeds: int) -> Iterable[tuple[tuple[str, int], Mask]]:
    """((name, seed), mask) of every mask, with `seeds` random masks of the same counts per matrix beside each."""
    for name, mask in masks.items():
        yield (name, 0), mask
        yield from (((f"random like {name}", seed), random_like(mask, seed)) for seed in range(seeds))


def once(model: Model, tests: Tests, before: Callable[[], Measurement] | None = None) -> Callable[[], Measurement]:
    """What the model as it is measures, found out when it is first asked for; `before`: what measured the same tests, or more."""
    return cache(lambda: before().part(tests) if before else measure(model, tests))
