"""The shape of a sweep's result table: variables, coordinates, and what a report needs to draw them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from jaxmed import results
from jaxmed.effects.estimands import ESTIMANDS, variable
from jaxmed.effects.job import Job
from jaxmed.effects.mediators import EXPERT, MEDIATORS, OF_NEURON
from jaxmed.effects.methods import METHODS
from jaxmed.effects.outcomes import outcome_name
from jaxmed.effects.sets import UnitPath, UnitSet
from jaxmed.files import simple
from jaxmed.tokens import BY_POSITION

TOGETHER = {"joint": ("set", "units that are patched together"), "path": ("route", "a sender whose change reaches some receivers alone")}
"""Variable -> (its dimension, what one of it is)."""
_OTHERS = (
    *("layer", "outcome", "position", "token", "noise_floor", *EXPERT),
    *(one.coordinate for one in MEDIATORS.values()),
    *(name for variable, (dim, _) in TOGETHER.items() for name in (variable, dim, f"{dim}_units")),
)
"""Names that a table uses, of some runs at least."""
MOST_LETTERS = 100
"""Of the name of a coordinate that is made of an extra column."""


def _several(job: Job) -> tuple[str, ...]:
    """The outcome axis, where there are several outcomes."""
    return ("outcome",) if len(job.request.outcomes) > 1 else ()


def _dims(job: Job, unit: str) -> tuple[str, ...]:
    index = (MEDIATORS[unit].coordinate,) if MEDIATORS[unit].coordinate else ()
    return (*_several(job), "pair", "layer", *index, *(("position",) if job.request.position in BY_POSITION else ()))


def _together(job: Job) -> dict[str, tuple[UnitSet | UnitPath, ...]]:
    """What is patched together: variable, whose dimension has its name -> its rows."""
    return {name: rows for name, rows in (("joint", job.request.sets), ("path", job.request.paths)) if rows}


def coordinates(job: Job) -> dict[str, Any]:
    """Coordinates of the result table; a pair's extra columns are among them."""
    config, request = job.model.config, job.request
    found: dict[str, Any] = {"pair": [pair.id for pair in job.pairs]}
    for label in ("category", "group", "split", "control"):
        found[label] = ("pair", [getattr(pair, label) for pair in job.pairs])
    for column, name in _extra_names(job, found).items():
        found[name] = ("pair", [str(pair.extra.get(column, "")) for pair in job.pairs])
    found["layer"] = np.arange(config.layers)
    if _several(job):
        found["outcome"] = [outcome_name(outcome) for outcome in request.outcomes]
    for unit in request.units:
        if MEDIATORS[unit].coordinate:
            found[MEDIATORS[unit].coordinate] = np.arange(MEDIATORS[unit].count(config, request.window))
    for name, rows in _together(job).items():
        dim = TOGETHER[name][0]
        found[dim] = [row.name for row in rows]
        found[f"{dim}_units"] = (dim, [json.dumps(simple(asdict(row))) for row in rows])
    if config.experts and OF_NEURON in found:
        for name, values in zip(EXPERT, np.divmod(np.arange(config.neurons), config.sizes["M"]), strict=True):
            found[name] = (OF_NEURON, values)
    if request.position == "each":
        found["position"] = np.arange(-max(len(contrast.patches) for contrast in job.contrasts), 0)
        found["token"] = (("pair", "position"), _tokens(job, len(found["position"])))
    if request.position == "spans":
        found["position"] = [patch.label for patch in job.contrasts[0].patches]
    return found


def _tokens(job: Job, width: int) -> np.ndarray:
    """Texts of the base prompts' tokens, str [pair, position]; empty where a prompt is shorter."""
    rows = []
    for contrast in job.contrasts:
        decode = contrast.base.model.tokenizer.decode
        texts = [decode([int(contrast.base.ids[patch.base[0]])]) for patch in contrast.patches]
        rows.append([""] * (width - len(texts)) + texts)
    return np.asarray(rows, str)


def _extra_names(job: Job, taken: Iterable[str]) -> dict[Any, str]:
    """Extra column of the pairs -> its coordinate: the column's name, or one like it that is free and that a folder can have."""
    results_of = tuple(variable.name for variable in variables(job))
    used, found = {*taken, *results_of, *_OTHERS}, {}
    for column in dict.fromkeys(name for pair in job.pairs for name in pair.extra):
        name = re.sub(r"[^\w-]", "_", str(column))[:MOST_LETTERS] or "_"  # xarray splits lists of names at spaces
        while name in used or name.startswith(tuple(f"{one}_" for one in results_of)):
            name = f"of_{name}"
        used.add(name)
        found[column] = name
    return found


def variables(job: Job) -> list[results.Variable]:
    """Variables of the result table."""
    table = [
        results.Variable(variable(unit, estimand), _dims(job, unit), attributes=_told(job, unit, estimand))
        for unit in job.request.units
        for estimand in job.request.estimands
    ]
    table += [one for unit in job.request.units if METHODS[job.request.method].screened for one in _of_screen(job, unit)]
    table += [
        results.Variable(f"{unit}_{end}", _dims(job, unit), attributes={"of": unit, "formula": told})
        for unit in job.request.units
        for end, told in METHODS[job.request.method].beside
    ]
    outcome, position = _several(job), ("position",) if job.request.position in BY_POSITION else ()
    table += [
        results.Variable(
            variable(name, estimand), (*outcome, "pair", TOGETHER[name][0], *position), attributes=_told_together(job, name, estimand)
        )
        for name in _together(job)
        for estimand in job.request.estimands
    ]
    table += [results.Variable(name, (*outcome, "pair")) for name in ("base_outcome", "source_outcome")]
    restarts = METHODS[job.request.method].restarts
    table += [results.Variable(name, (*outcome, "pair", "layer")) for name in ("base_lowest", "base_highest") if restarts]
    table += [results.Variable("routing_margin", ("pair", "layer"))] if job.model.config.experts else []
    return [*table, results.Variable("done", ("pair", "layer"), "uint8")]


VERIFIED, PROBABILITY, ESTIMATE, ERROR, RECALL = "verified", "probability", "estimate", "error", ("recall", "recall_low", "recall_high")
"""Endings of the variables that a screened sweep has beside a unit's."""


def _of_screen(job: Job, unit: str) -> list[results.Variable]:
    """What a screened sweep knows of a unit's values: their estimates, which are exact, how far the others may be off, and the recall."""
    dims, several = _dims(job, unit), _several(job)
    found = [results.Variable(f"{unit}_{end}", dims, attributes={"of": unit}) for end in (ESTIMATE, ERROR)]
    found += [results.Variable(f"{unit}_{PROBABILITY}", dims[len(several) :], attributes={"of": unit})]
    found += [results.Variable(f"{unit}_{VERIFIED}", dims[len(several) :], "uint8", {"of": unit})]
    told = {"of": unit, "top": job.request.top}
    return found + [results.Variable(f"{unit}_{end}", (*several, "pair"), attributes=told) for end in RECALL]


def _told(job: Job, unit: str, estimand: str) -> dict[str, Any]:
    """A variable's attributes: what it is, and how a report draws it."""
    mediator = MEDIATORS[unit]
    told = {"unit": unit, "told": mediator.told, "coordinate": mediator.coordinate, "show": mediator.show}
    told |= {"window": job.request.window} if mediator.windowed else {}
    return {**told, "estimand": estimand, "formula": _formula(job, estimand)}


def _formula(job: Job, estimand: str) -> str:
    """What a variable holds, in words."""
    method, formula = METHODS[job.request.method], ESTIMANDS[estimand].formula
    if method.screened:
        formula = f"{formula}; where it was not computed, its first-order estimate. {method.told}"
    elif not method.exact:
        formula = f"{method.values.removesuffix('s')} of the {formula}. Not computed: {method.told}"
    return formula if job.request.patch == "resample" else f"{formula}, where M(source) stands for {job.request.patching.told}"


def _told_together(job: Job, name: str, estimand: str) -> dict[str, Any]:
    dim, told = TOGETHER[name]
    return {"unit": name, "told": told, "coordinate": dim, "show": name, "estimand": estimand, "formula": _formula(job, estimand)}


def variable_shapes(job: Job) -> dict[str, list[int]]:
    """Shape of every variable of the result table."""
    sizes = {name: len(values[1]) if isinstance(values, tuple) else len(values) for name, values in coordinates(job).items()}
    return {one.name: [sizes[dim] for dim in one.dims] for one in variables(job)}


def table_bytes(job: Job) -> int:
    """Bytes of the table at most."""
    return 4 * sum(int(np.prod(shape)) for shape in variable_shapes(job).values())


def attributes(job: Job) -> dict[str, Any]:
    """Attributes of the whole table."""
    request = job.request
    found = {"position": str(request.position), "window": request.window, "model": job.model.name, "method": request.method}
    found |= {"values": METHODS[request.method].values, "method_told": METHODS[request.method].told}
    found |= {"contrast": request.contrast, "direction": request.direction}
    found |= {"patch": request.patch, "patch_told": request.patching.told}
    found |= {"patch_factor": request.patch_factor} if request.patch_factor is not None else {}
    found |= {"source_model": job.source_model.name} if job.source_model is not None else {}
    return {**found, "outcome": ", ".join(outcome_name(outcome) for outcome in request.outcomes)}
