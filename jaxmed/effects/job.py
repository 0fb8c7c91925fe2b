"""A sweep before it runs: a checked request on a model and pairs, and the sizes of its programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from jaxmed.axes import row_parts
from jaxmed.effects.budget import budget_part
from jaxmed.effects.contrast import Contrast, Reading, Side, make_contrasts
from jaxmed.effects.estimands import ESTIMANDS, PASSES
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.methods import METHODS
from jaxmed.effects.outcomes import outcome_name
from jaxmed.effects.pair_batches import shape_of
from jaxmed.effects.reference import Reference
from jaxmed.effects.request import Request, check_request, check_spans, layers_of
from jaxmed.effects.shapes import row_flops, shapes_of
from jaxmed.effects.stored import stored_digest
from jaxmed.errors import UserError, quoted
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.cost import matmul_rate, pairs_per_device, units_per_device
from jaxmed.tokens import DATE


@dataclass(frozen=True)
class Job:
    """A checked request on a model and pairs: everything that is known before the first pass.

    Attributes:
        chunk: rows per device of every program, by `chunk_key`; a resumed run takes those it began with.
        reference: what the patch has to know of all pairs; made when the job runs.
    """

    model: Model
    pairs: tuple[PromptPair, ...]
    request: Request
    layers: tuple[int, ...]
    contrasts: tuple[Contrast, ...]
    source_model: Model | None = None
    chunk: dict[str, int] = field(default_factory=dict)
    reference: Reference | None = field(default=None, compare=False)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Units that share chunks: each that fills chunks of one layer by itself, and all others together."""
        alone = {unit: (unit,) for unit in self.request.units if MEDIATORS[unit].by_layer}
        together = tuple(unit for unit in self.request.units if not MEDIATORS[unit].by_layer)
        return {**alone, **({"modules": together} if together else {})}

    @property
    def passes(self) -> tuple[str, ...]:
        """The restarted passes that the estimands need."""
        needed = {name for estimand in self.request.estimands for name in ESTIMANDS[estimand].needs}
        return tuple(name for name in PASSES if name in needed)

    def sides(self, contrast: Contrast) -> dict[bool, Contrast]:
        """The contrast as the passes need it: as it stands (False), turned (True)."""
        return {turned: contrast.turned() if turned else contrast for turned in {PASSES[name].turned for name in self.passes}}

    def with_weights(self, model: Model, source_model: Model | None = None) -> Job:
        """The job on models that have weights, where it was made of their configs and tokenizers alone."""

        def loaded(side: Side) -> Side:
            return replace(side, model=model if side.model is self.model else source_model or model)

        contrasts = tuple(replace(one, base=loaded(one.base), source=loaded(one.source)) for one in self.contrasts)
        return replace(self, model=model, source_model=source_model, contrasts=contrasts)

    def count(self, units: Sequence[str]) -> int:
        """How many units of these kinds a layer has."""
        return sum(MEDIATORS[unit].count(self.model.config, self.request.window) for unit in units)

    def count_in(self, pair: int, units: Sequence[str]) -> int:
        """How many units of these kinds a pair has, at all layers and positions."""
        return len(self.layers) * self.count(units) * len(self.contrasts[pair].patches)

    def screened(self, pair: int) -> tuple[str, ...]:
        """The kinds of units of which a screened sweep computes a part; of the others, which are FEW, it computes all."""
        return tuple(unit for unit in self.request.units if self.count_in(pair, [unit]) > FEW)

    def row_flops(self, pair: int, units: Sequence[str]) -> float:
        """FLOPs of exact effects of all units of these kinds of a pair, each by a row of its own."""
        layers, config = list(self.layers), self.model.config
        shapes = shapes_of(self.contrasts[pair])
        return sum(self.count([unit]) * row_flops(config, unit, shape)[layers].sum() for unit in units for shape in shapes)


def make_job(model: Model, pairs: Sequence[PromptPair], request: Request, source_model: Model | None = None) -> Job:
    """Everything that can be refused before a sweep runs, in one place; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: no pairs; bad outcome, unit, layer, position or window; texts that do not tokenise as the outcome needs.
    """
    if not pairs:
        raise UserError("There are no pairs to sweep.")
    if isinstance(pairs, str) or not all(isinstance(pair, PromptPair) for pair in pairs):
        raise UserError(f"pairs is a list of PromptPair, as jm.read_pairs(file) returns it; not {quoted(pairs)}.")
    request = check_request(request, model, source_model)
    if request.by and not any(pair.category for pair in pairs):
        raise UserError("No pair has a category, so there is nothing to split by. Give the column 'category', or leave --by out.")
    reading = Reading(request.contrast, request.position, request.form, request.outcomes)
    contrasts = make_contrasts(model, pairs, reading, source_model)
    if request.position == "spans":
        check_spans(contrasts)
    if request.direction == "reverse":
        contrasts = tuple(contrast.turned() for contrast in contrasts)
    job = Job(model, tuple(pairs), request, layers_of(model.config, request.layers), contrasts, source_model)
    return replace(job, chunk=_chunks(job))


def with_method(job: Job, method: str) -> Job:
    """The job by another method.

    Raises:
        UserError: what that method cannot be asked for.
    """
    request = check_request(replace(job.request, method=method), job.model, job.source_model)
    job = replace(job, request=request)
    return replace(job, chunk=_chunks(job))


MODULES_AT_ONCE = 128
"""Most rows per device of chunks that layers share: larger ones would restart earlier for all their rows."""
SETS_AT_ONCE, PATHS_AT_ONCE = 256, 64
"""Most rows per device of a chunk of sets, whose masks take memory, and of paths, whose rows have values of their own."""
BLOCK, BUDGET = "layers", "budget"
"""Entries of `Job.chunk`: how many layers an item has; and of screened sweeps, how many millionths of all exact effects' FLOPs their rows
may take."""
FEW = 1024
"""Units of a kind and pair that screened sweeps compute one and all, beside the budget: to leave some out would save little."""
SCREENED, SCREENED_AT_ONCE, SCREENED_PAIRS = "screened", 128, 4
"""The group of rows of any kinds and layers, the most of them per device and chunk, and the most pairs per device of an item: those that a
kill loses."""


def _chunks(job: Job) -> dict[str, int]:
    """Rows per device of every program, and layers per item.

    Each window has a size of its own, for a program is compiled per window anyway. An item is one layer where a kind of unit fills chunks
    of one layer; else as many layers as fill a chunk of the widest window.
    """
    method = METHODS[job.request.method]
    if method.screened:
        return _screened_sizes(job)
    if not method.exact:
        return _batch_sizes(job)
    config, mesh = job.model.config, job.model.mesh
    whole_rows = any(callable(outcome) for outcome in job.request.outcomes)
    sized = partial(units_per_device, config, mesh)
    shapes = {shape for contrast in job.contrasts for side in job.sides(contrast).values() for shape in shapes_of(side)}
    block, together = 1 if job.groups else len(job.layers), job.groups.get("modules", ())
    if together and len(job.groups) == 1:
        most = min(len(job.layers) * job.count(together), MODULES_AT_ONCE * row_parts(mesh))
        rows = min(sized(most, shape.window, shape.seen, whole_rows) for shape in shapes) * row_parts(mesh)
        block = max(1, min(rows // job.count(together), len(job.layers)))
    sizes = {
        shape.chunk_key(group): sized(job.count(units) * (block if group == "modules" else 1), shape.window, shape.seen, whole_rows)
        for shape in shapes
        for group, units in job.groups.items()
    }
    for group, most, count in (("joint", SETS_AT_ONCE, len(job.request.sets)), ("path", PATHS_AT_ONCE, len(job.request.paths))):
        rows = min(count, most * row_parts(mesh))
        sizes |= {shape.chunk_key(group): sized(rows, shape.window, shape.seen, whole_rows) for shape in shapes if rows}
    return {BLOCK: block, **dict(sorted(sizes.items()))}


def _batch_sizes(job: Job) -> dict[str, int]:
    """Pairs per batch of every shape: as many as keep the devices busy, in batches of about equal size."""
    counts = Counter(shape_of(contrast) for contrast in job.contrasts)
    devices, sizes = row_parts(job.model.mesh), {}
    for shape, count in sorted(counts.items()):
        most = pairs_per_device(job.model.config, job.model.mesh, shape.length, shape.window * job.count(job.request.units)) * devices
        sizes[shape.key] = -(-count // -(-count // most))
    return sizes


def _screened_sizes(job: Job) -> dict[str, int]:
    """Pairs per batch of estimates, rows per device of every window, and the budget."""
    devices, sized = row_parts(job.model.mesh), partial(units_per_device, job.model.config, job.model.mesh)
    sizes = {key: min(size, SCREENED_PAIRS * devices) for key, size in _batch_sizes(job).items()}
    whole_rows, most = any(callable(outcome) for outcome in job.request.outcomes), SCREENED_AT_ONCE * devices
    for shape in {shape for contrast in job.contrasts for shape in shapes_of(contrast)}:
        sizes[shape.chunk_key(SCREENED)] = sized(most, shape.window, shape.seen, whole_rows)
    sizes = dict(sorted(sizes.items()))
    every = sum(job.row_flops(pair, job.screened(pair)) for pair in range(len(job.contrasts)))
    part = budget_part(job.request.budget, every, lambda: estimate_rate(replace(job, chunk=sizes)))
    return {BUDGET: round(part * 1e6), **sizes}


def programs_of(chunk: dict[str, int]) -> dict[str, int]:
    """Of `Job.chunk`, what is of programs: rows per device of each."""
    return {key: size for key, size in chunk.items() if key not in (BLOCK, BUDGET)}


def manifest(job: Job) -> dict[str, Any]:
    """What must agree for a run to be resumed; stored in run.json."""
    request = job.request
    settings = {**asdict(request), "outcomes": [outcome_name(o) for o in request.outcomes]}
    method = METHODS[request.method]
    unused = ("by", *(("patch_factor",) if request.patch_factor is None else ()), *(() if method.screened else ("top", "budget")))
    unused += (*(("points",) if method.at_base else ()), *(() if request.reference else ("reference",)))
    settings |= {"reference": stored_digest(request.reference)} if request.reference else {}
    settings = {name: value for name, value in settings.items() if name not in unused}
    return {
        "request": settings,
        **({"source_model": job.source_model.record} if job.source_model is not None else {}),
        "layers": list(job.layers),
        "chunk": dict(job.chunk),
        **manifest_of(job.model, job.pairs, job.contrasts),
    }


def manifest_of(model: Model, pairs: Sequence[PromptPair], contrasts: Sequence[Contrast]) -> dict[str, Any]:
    """What every manifest says of a model, its devices, and the prompts that it is given."""
    return {
        **({"history": list(model.history)} if model.history else {}),
        "model": model.record,
        "mesh": dict(model.mesh.shape),
        "device": model.mesh.devices.flat[0].device_kind,
        "pairs": [pair.id for pair in pairs],
        "labels": [[pair.category, pair.group, pair.split, pair.control] for pair in pairs],
        "answers": [{"target": list(pair.target), "foil": list(pair.foil), "response": pair.response} for pair in pairs],
        "tokens": [{"base": contrast.base.ids.tolist(), "source": contrast.source.ids.tolist()} for contrast in contrasts],
        "template_date": DATE.date().isoformat(),
    }


def estimate_rate(job: Job) -> float:
    """Matmul FLOP/s of this machine at the job's chunk."""
    key = max(programs_of(job.chunk), key=job.chunk.__getitem__)
    window = int(key.rpartition("@")[2].partition("x")[0])
    return matmul_rate(job.model.config, job.model.mesh, int(np.maximum(job.chunk[key], 1)) * window)
