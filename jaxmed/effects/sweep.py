"""The sweep: every unit of every layer of every pair, written as it goes, resumable at any point."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr

from jaxmed import results
from jaxmed.effects.cost import open_items, plan
from jaxmed.effects.estimators import find_estimator
from jaxmed.effects.job import Job, make_job, manifest
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.patches import PATCHES
from jaxmed.effects.reference import Reference, make_reference
from jaxmed.effects.request import Request
from jaxmed.effects.sets import UnitPath, as_set, as_unit, layer_windows
from jaxmed.effects.stored import stored_reference
from jaxmed.effects.summary import summarise
from jaxmed.effects.table import attributes, coordinates, variables
from jaxmed.effects.work import Chunk, Estimator, Item
from jaxmed.errors import UserError, notice
from jaxmed.hosts import leads, several, wait_for_all
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.folder import RunFolder
from jaxmed.runs.watch import RESUMED, Watch, silent


def run_sweep(job: Job, out: Path, resume: bool = False, watch: Watch = silent, rate: float | None = None) -> None:
    """Runs a job into `out`. What is finished is on disk at every moment; an interrupted run goes on with `resume`.

    Raises:
        UserError: `out` holds something else, a run without `resume`, or a run of another request; it is in use, or has no room; a
            finished table that is damaged (what is damaged is computed when the run is resumed again).
    """
    _tell(job)
    planned = plan(job, rate)
    with RunFolder.open(out, manifest(job), resume, results.LEGAL, planned.cost.written + 1_000_000, reused=("chunk",)) as folder:
        if folder.continues:
            job = with_chunk(job, folder.manifest["chunk"])
        else:
            if leads():
                results.create(out, variables(job), coordinates(job), attributes(job))
            numbers = {"pairs": planned.pairs, "patches": planned.patches, "effects": planned.effects, "seconds": planned.seconds}
            folder.record["plan"] = {**numbers, "passes": planned.cost.passes, "flops": planned.cost.flops, "disk": planned.cost.written}
        with folder.session() as session:
            if leads():
                results.mend(folder)
            wait_for_all("the table is laid out")
            session.count(passes=0, layers=0)
            for done in _run_items(job, results.Table(out), watch):
                session.count(**done)
            folder.record |= _near_ties(job, out)


def _tell(job: Job) -> None:
    """Notices about what can be swept, but says little."""
    if PATCHES[job.request.patch].needs and job.request.patch != "noise" and not job.request.reference and len(job.pairs) == 1:
        notice(f"--patch {job.request.patch} takes means over pairs, and there is one pair: they are that pair's own values.")
    if job.source_model is not None and job.source_model.identity == job.model.identity:
        notice(f"The source model has the weights of {job.model.name}: where prompts are the same, every effect is zero.")


def with_chunk(job: Job, stored: Mapping[str, int]) -> Job:
    """The job with the chunk sizes that a run began with, so that its second half has the bits that it would have had."""
    return replace(job, chunk={key: stored.get(key, size) for key, size in job.chunk.items()})


def _run_items(job: Job, table: results.Table, watch: Watch) -> Iterator[dict[str, int]]:
    """Runs what is not done yet; yields what was done after every item. One item is computed while the one before is written."""
    estimator, done = find_estimator(job.request.method), table.done().astype(bool)
    wait_for_all("what is done is known")
    if todo := open_items(job, done):
        job = replace(job, reference=_reference(job))
    for item in _difference(estimator.items(job), todo):
        work = estimator.work(job, item)
        watch(work.flops, work.effects, RESUMED)
    pending: tuple[Item, Callable[[], list[Chunk]]] | None = None
    opened, pairs = None, ()
    for item in [*todo, None]:
        ahead = None
        if item is not None:
            if item.pairs != pairs:
                if pending is not None and opened is not None:  # one pair's records are held at a time
                    yield _commit(job, table, estimator, *pending, watch)
                    pending = None
                opened, pairs = estimator.open(job, item.pairs), item.pairs
                table.write(opened.known if opened is not None else [])
            ahead = item, estimator.start(job, item, opened)
        if pending is not None:
            yield _commit(job, table, estimator, *pending, watch)
        pending = ahead


def _reference(job: Job) -> Reference | None:
    """What the patch has to know of all pairs, or of the prompts of a folder."""
    if job.request.reference:
        return stored_reference(job.request.reference, job.model, job.request.kinds)
    return make_reference(PATCHES[job.request.patch].needs, job.contrasts, job.request.kinds)


def _difference(every: Any, todo: Any) -> list[Item]:
    """Of all items, the layers that are done."""
    left = {(item.pairs, layer) for item in todo for layer in item.layers}
    found = [Item(item.pairs, tuple(layer for layer in item.layers if (item.pairs, layer) not in left)) for item in every]
    return [item for item in found if item.layers]


def _commit(
    job: Job, table: results.Table, estimator: Estimator, item: Item, collect: Callable[[], list[Chunk]], watch: Watch
) -> dict[str, int]:
    """Writes a finished item, then marks its layers done."""
    table.write(collect())
    for pair in item.pairs:
        table.mark_done(pair, item.layers)
    work = estimator.work(job, item)
    watch(work.flops, work.effects, job.pairs[item.pairs[-1]].id)
    return {"passes": work.passes, "layers": len(item.layers) * len(item.pairs)}


def _near_ties(job: Job, out: Path) -> dict[str, Any]:
    """The entry of run.json on near-tied routing; empty without experts."""
    if not job.model.config.experts:
        return {}
    count, known = results.near_ties(results.open_results(out, check=False))
    return {"near_tied_routing": {"chunks": count, "of": known, "margin_below": results.NEAR_TIE}}


def sweep(
    model: Model,
    pairs: Sequence[PromptPair],
    outcome: OutcomeName | Sequence[OutcomeName] = "log-odds",
    unit: str | Sequence[str] | None = None,
    position: str | int = "last",
    window: int = 32,
    layers: Sequence[int] | None = None,
    form: str = "chat",
    out: str | Path | None = None,
    resume: bool = False,
    top: int = 50,
    seed: int = 0,
    estimand: str | Sequence[str] = "indirect",
    contrast: str = "pair",
    direction: str = "forward",
    source_model: Model | None = None,
    method: str = "exact",
    sets: Mapping[str, Any] | None = None,
    paths: Mapping[str, tuple[Sequence[Any], Sequence[Sequence[Any]]]] | None = None,
    by: str = "",
    patch: str = "resample",
    patch_factor: float | None = None,
    layer_window: int = 0,
    budget: str = "2%",
    points: int = 5,
    reference: str | Path = "",
    watch: Watch = silent,
) -> xr.Dataset:
    """Effects of every unit, with statistics over pairs: exact ones, or estimates (`method`). The arguments are the command's flags.

    effect = y(base; unit := its value in source) - y(base), with y the outcome (target against foil).

    Args:
        outcome: one or several of `jaxmed.effects.outcomes.OUTCOMES`, or functions of the logits [V] after the prompt.
        unit: one or several of neuron, gate, up, window, head_out, attention_out, mlp_out, both_out, residual_out; by default neuron, or
            none where sets or paths are given.
        position: last, user_last, header, user, each, spans, all, an index, or a substring.
        window: neurons per window, for the unit "window".
        layers: layers to sweep; all by default.
        form: how prompts are written: chat, text, plain, space or qa; see `prompts.forms`.
        out: folder for the table, run.json and top.csv; a temporary one by default.
        resume: go on with what `out` holds.
        estimand: one or several of indirect, direct, total, interaction, to_logits, via_later, both_ways.
        contrast: how a pair becomes two runs: "pair", as it stands; "prefill", base's request with the two openings; "model", base's
            prompt in two models.
        direction: "reverse": base and source change places.
        source_model: where source values come from, for the contrast "model".
        method: a key of `jaxmed.effects.methods.METHODS`. "exact" is the default here, whatever it takes. "attribution" and "relp" are
            first-order estimates of all units and positions of a pair, from two forwards and a backward; "attribution-star" adds a
            backward for every layer, and "mean-gradient" takes twice the runs. "integrated" takes `points` backwards for each layer,
            position and kind of unit. "screened" estimates all units and computes exactly those that are, or may be, among the `top`
            largest; the table says which, how far the others may be off, and how many of the largest were found.
        sets: name -> units (mediator, layer, index) that are patched together, or {"units": ..., "held": ...} with others that keep their
            base values meanwhile; the variable "joint".
        paths: name -> (sender, receivers): the sender's change reaches the receivers alone; the variable "path".
        patch: what is written in the place of a unit's base value: "resample", its value in source; "zero"; "mean", its mean over the
            source runs of all pairs, at their patched tokens; "noise", base's value plus Gaussian noise, the same for a seed, pair, layer,
            token and unit; "scale", a multiple of base's value; "steer", base's value plus a multiple of the mean of source minus base over
            all pairs; "ablate-direction", base's value without its component along that mean. See `jaxmed.effects.patches.PATCHES`.
        patch_factor: of "noise" (default 3 standard deviations), "scale" (2), and "steer" (1).
        reference: of "mean": a folder of `activations` (its `out`) or of `jaxmed cache write`, over whose prompts and tokens means are
            taken.
        layer_window: adjacent layers whose modules are patched together, as further sets "mlp_out 3-7" for every place; 0: none.
        budget: of a screened sweep: part of all exact effects' FLOPs ("2%"), FLOPs ("3e13 flop") or time ("20m") that exact ones may take.
        points: of integrated gradients, on each way from base to source, 1 to 64.
        by: "category": statistics and top.csv of every category of pairs too.
        watch: called with (FLOPs done, effects done, pair id) after every item.

    Returns:
        The result table, as an xarray dataset in memory.

    Raises:
        UserError: anything in the arguments that cannot be used; nothing has run then.
    """
    outcomes = (outcome,) if isinstance(outcome, str) or callable(outcome) else tuple(outcome)
    unit = (() if sets or paths or layer_window else "neuron") if unit is None else unit
    units = (unit,) if isinstance(unit, str) else tuple(unit)
    joint = tuple(as_set(name, given) for name, given in (sets or {}).items())
    joint += layer_windows(model.config.layers, layer_window) if layer_window else ()
    routes = tuple(UnitPath(name, as_unit(one), tuple(map(as_unit, those))) for name, (one, those) in (paths or {}).items())
    estimands = (estimand,) if isinstance(estimand, str) else tuple(estimand)
    chosen = None if layers is None else tuple(layers)
    how = (estimands, contrast, direction, method, joint, routes, by, patch, patch_factor, budget, points, str(reference))
    request = Request(outcomes, units, position, window, chosen, form, seed, top, *how)
    job = make_job(model, pairs, request, source_model)
    if out is None and several():
        raise UserError("Several processes write to one folder: give out=, a folder that all of them see.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run" if out is None else Path(out)
        run_sweep(job, folder, resume, watch)
        return summarise(folder, model, top, seed, by).load()
