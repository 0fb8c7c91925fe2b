"""A sweep before it runs: the request, checked against model and pairs, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from jaxmed.effects.contrast import CONTRASTS, Contrast, Reading, Side, make_contrasts
from jaxmed.effects.estimands import ESTIMANDS, PASSES, WHOLE, check_estimands
from jaxmed.effects.mediators import MEDIATORS, Record, check_units
from jaxmed.effects.outcomes import OutcomeName, check_outcomes, outcome_name
from jaxmed.effects.patches import PATCHES
from jaxmed.effects.readout import READ_BUCKETS, read_columns
from jaxmed.effects.sets import UnitPath, UnitSet, check_paths, check_sets, sites_of
from jaxmed.errors import UserError, unknown
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.cost import matmul_rate, units_per_device
from jaxmed.tokens import DATE, WINDOW_BUCKETS, bucket

DIRECTIONS = ("forward", "reverse")

BY = ("", "category")
"""What statistics may be split by."""


@dataclass(frozen=True)
class Request:
    """What a sweep computes.

    Attributes:
        outcomes: names in `OUTCOMES`, or functions of the logits after the last prompt token.
        units: keys of `MEDIATORS`.
        position: which tokens are patched (see `tokens.locate`), "each" one by itself, or "spans": each named span by itself.
        window: neurons per window of the unit "window".
        layers: layers to sweep; None is all.
        form: how prompts are written; see `prompts.forms`.
        seed: of resamples and flips.
        top: rows per unit in top.csv.
        estimands: keys of `ESTIMANDS`.
        contrast: a key of `CONTRASTS`: how a pair becomes two runs.
        direction: "reverse": base and source change places.
        method: a key of `ESTIMATORS`.
        sets, paths: units that are patched together, and senders with the receivers that respond to them; with these, `units` may be empty.
        patch: a key of `PATCHES`: what is written in the place of base values.
        by: what statistics are split by too, of `BY`.
    """

    outcomes: tuple[OutcomeName, ...] = ("log-odds",)
    units: tuple[str, ...] = ("neuron",)
    position: str | int = "last"
    window: int = 32
    layers: tuple[int, ...] | None = None
    form: str = "chat"
    seed: int = 0
    top: int = 50
    estimands: tuple[str, ...] = ("indirect",)
    contrast: str = "pair"
    direction: str = "forward"
    method: str = "exact"
    sets: tuple[UnitSet, ...] = ()
    paths: tuple[UnitPath, ...] = ()
    by: str = ""
    patch: str = "resample"


@dataclass(frozen=True)
class Job:
    """A checked request on a model and pairs: everything that is known before the first pass.

    Attributes:
        chunk: rows per device of every program, by `chunk_key`; a resumed run takes those it began with.
        means: of source runs, for patches that need them; made when the job runs.
    """

    model: Model
    pairs: tuple[PromptPair, ...]
    request: Request
    layers: tuple[int, ...]
    contrasts: tuple[Contrast, ...]
    source_model: Model | None = None
    chunk: dict[str, int] = field(default_factory=dict)
    means: Record | None = field(default=None, compare=False)

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

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of all units that are patched, alone or together."""
        together = [one.units for one in self.request.sets] + [(one.sender, *one.receivers) for one in self.request.paths]
        return tuple(dict.fromkeys((*self.request.units, *(kind for units in together for kind in sites_of(units)))))

    def sides(self, contrast: Contrast) -> dict[bool, Contrast]:
        """The contrast as the passes need it: as it stands (False), turned (True)."""
        return {turned: contrast.turned() if turned else contrast for turned in {PASSES[name].turned for name in self.passes}}

    def with_weights(self, model: Model, source_model: Model | None = None) -> Job:
        """The job on models that have weights, where it was made of their configs and tokenizers alone."""

        def loaded(side: Side) -> Side:
            return Side(model if side.model is self.model else source_model or model, side.ids)

        contrasts = tuple(replace(one, base=loaded(one.base), source=loaded(one.source)) for one in self.contrasts)
        return replace(self, model=model, source_model=source_model, contrasts=contrasts)

    def count(self, units: Sequence[str]) -> int:
        """How many units of these kinds a layer has."""
        return sum(MEDIATORS[unit].count(self.model.config, self.request.window) for unit in units)


@dataclass(frozen=True)
class Shape:
    """The sizes of one patch's programs: tokens that rows carry, that they see, and that are read."""

    window: int
    seen: int
    asked: int

    def chunk_key(self, group: str) -> str:
        """The key of `Job.chunk`: the group of units, and the program's sizes."""
        return f"{group}@{self.window}x{self.seen}"


def shapes_of(contrast: Contrast) -> list[Shape]:
    """The sizes of every patch of a contrast."""
    packed = contrast.packed()
    asked = bucket(len(read_columns(packed)), READ_BUCKETS)
    return [Shape(bucket(packed.used - patch.base[0], WINDOW_BUCKETS), len(packed.tokens), asked) for patch in contrast.patches]


def make_job(model: Model, pairs: Sequence[PromptPair], request: Request, source_model: Model | None = None) -> Job:
    """Everything that can be refused before a sweep runs, in one place; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: no pairs; bad outcome, unit, layer, position or window; texts that do not tokenise as the outcome needs.
    """
    if not pairs:
        raise UserError("There are no pairs to sweep.")
    outcomes, together = check_outcomes(request.outcomes), bool(request.sets or request.paths)
    units = () if together and not request.units else check_units(request.units)
    request = replace(request, outcomes=outcomes, units=units, estimands=check_estimands(tuple(request.estimands)))
    check_sets(model.config, request.sets, request.window)
    check_paths(model.config, request.paths, request.window)
    _check_words(request, model, source_model)
    if request.by and not any(pair.category for pair in pairs):
        raise UserError("No pair has a category, so there is nothing to split by. Give the column 'category', or leave --by out.")
    layers = _check_layers(model.config, request.layers)
    if any(MEDIATORS[unit].windowed for unit in units):
        _check_window(model.config, request.window)
    reading = Reading(request.contrast, request.position, request.form, outcomes)
    contrasts = make_contrasts(model, pairs, reading, source_model)
    if request.position == "spans":
        _check_spans(contrasts)
    if request.direction == "reverse":
        contrasts = tuple(contrast.turned() for contrast in contrasts)
    job = Job(model, tuple(pairs), request, layers, contrasts, source_model)
    return replace(job, chunk=_chunks(job))


def _check_siblings(model: Model, source_model: Model) -> None:
    """Two models are compared activation by activation on the same token ids."""
    for name in ("layers", "width", "heads", "kv_heads", "head_width", "neurons", "experts", "vocabulary"):
        ours, theirs = getattr(model.config, name), getattr(source_model.config, name)
        if ours != theirs:
            raise UserError(f"{source_model.name} has {name} {theirs} and {model.name} has {ours}: values cannot be copied between them.")
    tokenizers = model.tokenizer, source_model.tokenizer
    if None not in tokenizers and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise UserError(f"{source_model.name} and {model.name} have different vocabularies: the same token ids are other texts.")


def _check_words(request: Request, model: Model, source_model: Model | None) -> None:
    if request.contrast not in CONTRASTS:
        raise unknown("contrast", request.contrast, CONTRASTS)
    _check_together(request)
    if request.patch not in PATCHES:
        raise unknown("patch", request.patch, PATCHES)
    other = [name for name in request.estimands if any(PASSES[need].turned for need in ESTIMANDS[name].needs - {"total"})]
    if request.patch != "resample" and other:
        raise UserError(f"The estimand {other[0]!r} patches the source run with base's values; it goes with --patch resample alone.")
    if request.direction not in DIRECTIONS:
        raise unknown("direction", request.direction, DIRECTIONS)
    if request.by not in BY:
        raise unknown("way to split statistics", request.by, BY)
    if source_model is not None:
        _check_siblings(model, source_model)
    if (request.contrast == "model") != (source_model is not None):
        raise UserError('The contrast "model" compares two models on the same tokens: give it a source model, and no other contrast one.')


def _check_together(request: Request) -> None:
    """Sets and paths have no vector of their own in the residual stream."""
    if (request.sets or request.paths) and (other := [name for name in request.estimands if name not in WHOLE]):
        raise UserError(f"Sets and paths have no estimand {other[0]!r}; they have: {', '.join(sorted(WHOLE))}. Sweep single units apart.")


def _check_layers(config: ModelConfig, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    found = tuple(range(config.layers)) if layers is None else tuple(sorted(set(layers)))
    if not found or not 0 <= found[0] <= found[-1] < config.layers:
        raise UserError(f"--layers names layer {found[-1] if found else 'none'}; this model has layers 0 to {config.layers - 1}.")
    return found


def _check_spans(contrasts: Sequence[Contrast]) -> None:
    """Means over pairs are taken span by span, so all pairs have the same ones."""
    labels = [[patch.label for patch in contrast.patches] for contrast in contrasts]
    for contrast, own in zip(contrasts, labels, strict=True):
        if own != labels[0]:
            first = contrasts[0].pair.id
            raise UserError(
                f"pair {contrast.pair.id!r} has the spans {own}, and pair {first!r} has {labels[0]}. Give all pairs the same columns."
            )


def _check_window(config: ModelConfig, window: int) -> None:
    """Refuses a window of more neurons than a layer has, and in a mixture one that would straddle experts."""
    if not 1 <= window <= config.neurons:
        raise UserError(f"--window {window} is out of range: 1 to {config.neurons} neurons.")
    inside = config.sizes["M"]
    if config.experts and inside % window:
        legal = ", ".join(str(size) for size in range(1, inside + 1) if inside % size == 0)
        raise UserError(f"--window {window} would straddle experts, which have {inside} neurons each. Legal: {legal}.")


MODULES_AT_ONCE = 128
"""Most rows per device of chunks that layers share: larger ones would restart earlier for all their rows."""
SETS_AT_ONCE, PATHS_AT_ONCE = 256, 64
"""Most rows per device of a chunk of sets, whose masks take memory, and of paths, whose rows have values of their own."""
BLOCK = "layers"
"""Entry of `Job.chunk`: how many layers an item has."""


def _chunks(job: Job) -> dict[str, int]:
    """Rows per device of every program, and layers per item.

    Each window has a size of its own, for a program is compiled per window anyway. An item is one layer where a kind of unit fills chunks
    of one layer; else as many layers as fill a chunk of the widest window.
    """
    config, mesh = job.model.config, job.model.mesh
    whole_rows = any(callable(outcome) for outcome in job.request.outcomes)
    sized = partial(units_per_device, config, mesh)
    shapes = {shape for contrast in job.contrasts for side in job.sides(contrast).values() for shape in shapes_of(side)}
    block, together = 1 if job.groups else len(job.layers), job.groups.get("modules", ())
    if together and len(job.groups) == 1:
        most = min(len(job.layers) * job.count(together), MODULES_AT_ONCE * mesh.shape["data"])
        rows = min(sized(most, shape.window, shape.seen, whole_rows) for shape in shapes) * mesh.shape["data"]
        block = max(1, min(rows // job.count(together), len(job.layers)))
    sizes = {
        shape.chunk_key(group): sized(job.count(units) * (block if group == "modules" else 1), shape.window, shape.seen, whole_rows)
        for shape in shapes
        for group, units in job.groups.items()
    }
    for group, most, count in (("joint", SETS_AT_ONCE, len(job.request.sets)), ("path", PATHS_AT_ONCE, len(job.request.paths))):
        rows = min(count, most * mesh.shape["data"])
        sizes |= {shape.chunk_key(group): sized(rows, shape.window, shape.seen, whole_rows) for shape in shapes if rows}
    return {BLOCK: block, **dict(sorted(sizes.items()))}


def manifest(job: Job) -> dict[str, Any]:
    """What must agree for a run to be resumed; stored in run.json."""
    request, model = job.request, job.model
    settings = {**asdict(request), "outcomes": [outcome_name(o) for o in request.outcomes]}
    del settings["top"], settings["by"]
    return {
        "request": settings,
        **({"history": list(model.history)} if model.history else {}),
        **({"source_model": _of_model(job.source_model)} if job.source_model is not None else {}),
        "layers": list(job.layers),
        "model": _of_model(model),
        "chunk": dict(job.chunk),
        "mesh": dict(model.mesh.shape),
        "device": model.mesh.devices.flat[0].device_kind,
        "pairs": [pair.id for pair in job.pairs],
        "labels": [[pair.category, pair.group, pair.split, pair.control] for pair in job.pairs],
        "answers": [{"target": list(pair.target), "foil": list(pair.foil), "response": pair.response} for pair in job.pairs],
        "tokens": [{"base": contrast.base.ids.tolist(), "source": contrast.source.ids.tolist()} for contrast in job.contrasts],
        "template_date": DATE.date().isoformat(),
    }


def _of_model(model: Model) -> dict[str, Any]:
    return {"name": model.name, "revision": model.revision, "weights": model.identity, "dtype": model.config.dtype}


def estimate_rate(job: Job) -> float:
    """Matmul FLOP/s of this machine at the job's chunk."""
    key = max((name for name in job.chunk if name != BLOCK), key=job.chunk.__getitem__)
    window = int(key.rpartition("@")[2].partition("x")[0])
    return matmul_rate(job.model.config, job.model.mesh, int(np.maximum(job.chunk[key], 1)) * window)
