"""A sweep before it runs: the request, checked against model and pairs, its cost, and the shape of its result table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxmed import results
from jaxmed.effects.exact import module_units
from jaxmed.effects.outcomes import OutcomeName, check_outcomes, encode_answers, outcome_name
from jaxmed.effects.units import EXPERT, UNITS, check_units, units_per_layer
from jaxmed.errors import UserError
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.cost import Plan, matmul_rate, propagate_flops, units_per_device
from jaxmed.tokens import DATE, WINDOW_BUCKETS, Patch, align, bucket, check_tokens, pack, render


@dataclass(frozen=True)
class Request:
    """What a sweep computes.

    Attributes:
        outcomes: names in `OUTCOMES`, or functions of the logits after the last prompt token.
        units: kinds of units.
        position: which tokens are patched (see `tokens.locate`), or "each".
        window: neurons per window of the unit "window".
        layers: layers to sweep; None is all.
        form: how prompts are written; see `prompts.forms`.
        seed: of resamples and flips.
        top: rows per unit in top.csv.
    """

    outcomes: tuple[OutcomeName, ...] = ("log-odds",)
    units: tuple[str, ...] = ("neuron",)
    position: str | int = "last"
    window: int = 32
    layers: tuple[int, ...] | None = None
    form: str = "chat"
    seed: int = 0
    top: int = 50


@dataclass(frozen=True)
class Job:
    """A checked request on a model and pairs: everything that is known before the first pass."""

    model: Model
    pairs: tuple[PromptPair, ...]
    request: Request
    layers: tuple[int, ...]
    patches: tuple[tuple[Patch, ...], ...]
    tokens: tuple[dict[str, list[int]], ...]
    shapes: tuple[tuple[int, int, int], ...]  # per pair: length bucket, widest window bucket, tokens used
    chunk: dict[str, int] = field(default_factory=dict)

    @property
    def many(self) -> tuple[str, ...]:
        return tuple(unit for unit in self.request.units if UNITS[unit].many)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(unit for unit in self.request.units if not UNITS[unit].many)


def check(model: Model, pairs: Sequence[PromptPair], request: Request) -> Job:
    """Everything that can be refused before a sweep runs, in one place; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: bad outcome, unit, layer, position or window; texts that do not tokenise as the outcome needs.
    """
    config = model.config
    outcomes, units = check_outcomes(request.outcomes), check_units(request.units)
    request = Request(**{**vars(request), "outcomes": outcomes, "units": units})
    layers = tuple(range(config.layers)) if request.layers is None else tuple(sorted(set(request.layers)))
    if not layers or not 0 <= layers[0] <= layers[-1] < config.layers:
        raise UserError(f"--layers names layer {layers[-1] if layers else 'none'}; this model has layers 0 to {config.layers - 1}.")
    if "window" in units:
        _check_window(config, request.window)
    patches, tokens, shapes = [], [], []
    for pair in pairs:
        try:
            base, source = (render(model.tokenizer, pair, side, request.form) for side in ("base", "source"))
            here = tuple(align(base, source, request.position))
            answers = encode_answers(model.tokenizer, pair, outcomes, request.form).ids
            more = max(map(len, answers), default=1) - 1
            check_tokens(config, (base.ids, source.ids), "the prompt", model.tokenizer, more)
            check_tokens(config, answers, "an answer", model.tokenizer)
        except UserError as error:
            raise UserError(f"pair {pair.id!r}: {error}" if "pair " not in str(error) else str(error)) from None
        packed = pack(base.ids, answers)
        patches.append(here)
        tokens.append({"base": base.ids.tolist(), "source": source.ids.tolist()})
        shapes.append((len(packed.tokens), bucket(packed.used - min(p.base[0] for p in here), WINDOW_BUCKETS), packed.used))
    job = Job(model, tuple(pairs), request, layers, tuple(patches), tuple(tokens), tuple(shapes))
    job.chunk.update(_chunks(job))
    return job


def _check_window(config: ModelConfig, window: int) -> None:
    """Refuses a window of more neurons than a layer has, and in a mixture one that would straddle experts."""
    if not 1 <= window <= config.neurons:
        raise UserError(f"--window {window} is out of range: 1 to {config.neurons} neurons.")
    inside = config.sizes["M"]
    if config.experts and inside % window:
        legal = ", ".join(str(size) for size in range(1, inside + 1) if inside % size == 0)
        raise UserError(f"--window {window} would straddle experts, which have {inside} neurons each. Legal: {legal}.")


def _chunks(job: Job) -> dict[str, int]:
    """Units per device of each kind, for the widest window and longest prompt of the sweep."""
    config, request = job.model.config, job.request
    seen, window = max(s[0] for s in job.shapes), max(s[1] for s in job.shapes)
    whole_rows = any(callable(outcome) for outcome in request.outcomes)
    sizes = {
        unit: units_per_device(config, job.model.mesh, units_per_layer(config, unit, request.window), window, seen, whole_rows)
        for unit in job.many
    }
    if job.modules:
        count = len(module_units(config, job.modules))
        sizes["module"] = units_per_device(config, job.model.mesh, min(count, 128 * job.model.mesh.shape["data"]), window, seen, whole_rows)
    return sizes


def plan(job: Job, rate: float | None = None) -> Plan:
    """The cost of a job; `rate` (FLOP/s) turns FLOPs into seconds."""
    config, devices = job.model.config, job.model.mesh.shape["data"]
    passes, flops, effects = 0, 0.0, 0
    for patches, (seen, _, used) in zip(job.patches, job.shapes, strict=True):
        flops += 2 * propagate_flops(config, 1, seen, 0, config.layers)
        for patch in patches:
            window = bucket(used - patch.base[0], WINDOW_BUCKETS)
            for unit in job.many:
                units = units_per_layer(config, unit, job.request.window)
                rows = -(-units // (job.chunk[unit] * devices)) * (job.chunk[unit] + 1) * devices
                passes += rows * len(job.layers)
                effects += units * len(job.layers)
                flops += sum(propagate_flops(config, rows, window, seen, config.layers - 1 - layer) for layer in job.layers)
            if job.modules:
                named = module_units(config, job.modules)
                per_chunk = job.chunk["module"] * devices
                for begin in range(0, len(named), per_chunk):
                    rows = per_chunk + devices
                    passes += rows
                    flops += propagate_flops(config, rows, window, seen, config.layers - named[begin][1])
                effects += sum(layer in job.layers for _, layer, _ in named)
    disk = 4 * sum(int(np.prod(v)) for v in variable_shapes(job).values())
    return Plan(
        pairs=len(job.pairs),
        patches=sum(len(p) for p in job.patches),
        effects=effects * len(job.request.outcomes),
        chunk=job.chunk,
        passes=passes,
        flops=flops,
        disk=disk,
        seconds=flops / rate if rate else None,
    )


def _dims(job: Job, unit: str) -> tuple[str, ...]:
    outcome = ("outcome",) if len(job.request.outcomes) > 1 else ()
    index = (UNITS[unit].coordinate,) if UNITS[unit].coordinate else ()
    return (*outcome, "pair", "layer", *index, *(("position",) if job.request.position == "each" else ()))


def coordinates(job: Job) -> dict[str, Any]:
    """Coordinates of the result table."""
    config, request = job.model.config, job.request
    found: dict[str, Any] = {
        "pair": [pair.id for pair in job.pairs],
        "category": ("pair", [pair.category for pair in job.pairs]),
        "group": ("pair", [pair.group for pair in job.pairs]),
        "split": ("pair", [pair.split for pair in job.pairs]),
        "control": ("pair", [pair.control for pair in job.pairs]),
        "layer": np.arange(config.layers),
    }
    if len(request.outcomes) > 1:
        found["outcome"] = [outcome_name(outcome) for outcome in request.outcomes]
    for unit in request.units:
        if UNITS[unit].coordinate:
            found[UNITS[unit].coordinate] = np.arange(units_per_layer(config, unit, request.window))
    if config.experts and "neuron" in request.units:
        for name, values in zip(EXPERT, np.divmod(np.arange(config.neurons), config.sizes["M"]), strict=True):
            found[name] = (UNITS["neuron"].coordinate, values)
    if request.position == "each":
        found["position"] = np.arange(-max(len(patches) for patches in job.patches), 0)
    return found


def variables(job: Job) -> list[results.Variable]:
    """Variables of the result table."""
    outcome = ("outcome",) if len(job.request.outcomes) > 1 else ()
    table = [results.Variable(unit, _dims(job, unit)) for unit in job.request.units]
    table += [results.Variable(name, (*outcome, "pair")) for name in ("base_outcome", "source_outcome")]
    table += [results.Variable(name, (*outcome, "pair", "layer")) for name in ("base_lowest", "base_highest")]
    table += [results.Variable("routing_margin", ("pair", "layer"))] if job.model.config.experts else []
    return [*table, results.Variable("done", ("pair", "layer"), "uint8")]


def variable_shapes(job: Job) -> dict[str, list[int]]:
    """Shape of every variable of the result table."""
    sizes = {name: len(values[1]) if isinstance(values, tuple) else len(values) for name, values in coordinates(job).items()}
    return {variable.name: [sizes[dim] for dim in variable.dims] for variable in variables(job)}


def manifest(job: Job) -> dict[str, Any]:
    """What must agree for a run to be resumed; stored in run.json."""
    request, model = job.request, job.model
    settings = {**asdict(request), "outcomes": [outcome_name(o) for o in request.outcomes]}
    settings.pop("top")
    return {
        "request": settings,
        **({"history": list(model.history)} if model.history else {}),
        "layers": list(job.layers),
        "model": {"name": model.name, "revision": model.revision, "weights": model.identity, "dtype": model.config.dtype},
        "chunk": dict(job.chunk),
        "mesh": dict(model.mesh.shape),
        "device": model.mesh.devices.flat[0].device_kind,
        "pairs": [pair.id for pair in job.pairs],
        "labels": [[pair.category, pair.group, pair.split, pair.control] for pair in job.pairs],
        "answers": [{"target": list(pair.target), "foil": list(pair.foil), "response": pair.response} for pair in job.pairs],
        "tokens": list(job.tokens),
        "template_date": DATE.date().isoformat(),
    }


def layer_flops(job: Job, number: int, layer: int) -> float:
    """FLOPs that progress counts for a layer: its neuron rows, or its share of the modules."""
    config, (seen, _, used) = job.model.config, job.shapes[number]
    rows = sum(units_per_layer(config, unit, job.request.window) for unit in job.many) or 1
    return sum(
        propagate_flops(config, rows, bucket(used - patch.base[0], WINDOW_BUCKETS), seen, config.layers - layer)
        for patch in job.patches[number]
    )


def layer_effects(job: Job, number: int) -> int:
    """Effects of one layer of one pair."""
    count = sum(units_per_layer(job.model.config, unit, job.request.window) for unit in job.request.units)
    return count * len(job.patches[number]) * len(job.request.outcomes)


def progress_total(job: Job) -> float:
    """What `report`'s FLOPs add up to."""
    return sum(layer_flops(job, number, layer) for number in range(len(job.pairs)) for layer in job.layers)


def estimate_rate(job: Job) -> float:
    """Matmul FLOP/s of this machine at the job's chunk."""
    return matmul_rate(job.model.config, job.model.mesh, max(job.chunk.values()) * job.shapes[0][1])
