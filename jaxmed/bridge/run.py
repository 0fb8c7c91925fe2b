"""The bridge in its folder: scores and masks, enrichment, effects before and after pruning, and pruning parts of it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed.bridge.conditions import PAIRS, PRUNED, Units, make_conditions, run_conditions
from jaxmed.bridge.effects import after_rows
from jaxmed.bridge.enrichment import ALIKE, RANDOM, Counting, enriched
from jaxmed.bridge.job import BridgeJob
from jaxmed.bridge.mediators import Effects, single_effects, strongest
from jaxmed.bridge.tally import random_alike
from jaxmed.bridge.verdicts import bridge_verdicts
from jaxmed.effects.cost import plan, progress_total
from jaxmed.effects.job import Job
from jaxmed.effects.sets import UnitSet
from jaxmed.effects.summary import summarise
from jaxmed.effects.sweep import run_sweep
from jaxmed.evaluation.perplexity import segments
from jaxmed.files import read_csv, write_csv
from jaxmed.gating.clamp import Judging
from jaxmed.gating.rankings import matched
from jaxmed.gating.tables import VERDICTS
from jaxmed.models.checkpoints.edit_record import ATTACK
from jaxmed.models.named_weights import matrix_shapes, weights_by_name
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.scores import Scores, read_scores, run_job
from jaxmed.pruning.selection import random_like, select
from jaxmed.results import open_results
from jaxmed.runs.cost import Cost
from jaxmed.runs.folder import RunFolder, read_run
from jaxmed.runs.legal import Legal, check_folder, check_same
from jaxmed.runs.watch import Display

SWEEPS = ("heads", "before", "after", "after-neurons")
ENRICHMENT, CORRELATIONS, UNIT_TABLE, EFFECTS = "enrichment.csv", "correlations.csv", "units.csv", "effects.csv"
TABLES = (ENRICHMENT, CORRELATIONS, UNIT_TABLE, EFFECTS, PRUNED, PAIRS, VERDICTS)
LEGAL = Legal((*SWEEPS, *TABLES), begins=("scores-",), measured=TABLES)
HALVES = (0, 1)
PERMUTATIONS = 5000


def check_bridge(job: BridgeJob, out: Path, judging: Judging) -> None:
    """Raises a UserError where `out` holds something else, or another bridge: before the rest of a study runs."""
    if check_folder(out, True, LEGAL):
        check_same(out, read_run(out).get("manifest", {}), _manifest(job, judging))


def _manifest(job: BridgeJob, judging: Judging) -> dict[str, Any]:
    return {**job.manifest(), **({"judging": dict(judging.settings)} if job.gate.request.spec.tokens else {})}


def run_bridge(job: BridgeJob, neurons: Path, out: Path, display: Display, judging: Judging) -> None:
    """Runs, or goes on with, a bridge in `out`. What is finished is on disk at every moment.

    Args:
        neurons: folder of the gate's sweep of single neurons.

    Raises:
        UserError: `out` holds something else, or another bridge; it is in use, or has no room.
    """
    with RunFolder.open(out, _manifest(job, judging), True, LEGAL, bridge_cost(job).written) as folder, folder.session():
        masks, scores = _masks(job, out, display)
        _sweep(job.heads, out / "heads", "single heads", display)
        tables = {"neuron": open_results(neurons).load(), "head_out": open_results(out / "heads").load()}
        norms = _enrich(job, tables, masks, scores, out)
        sets = _sets(job, tables, norms)
        _sweep(job.sweep(job.gate.model, units=(), sets=sets, layers=(job.gate.layout.layer,)), out / "before", "before pruning", display)
        pruned = apply_mask(job.gate.model, masks[job.names[0]])
        for name, one in job.after(pruned, sets).items():
            _sweep(one, out / name, f"{name.replace('-', ', ')}: pruned for {job.names[0]}", display)
        write_csv(out / EFFECTS, after_rows(job, tables, open_results(neurons.parent / "modules").load(), out))
        units = {place: found for place, found in strongest(_effects(tables), job.spec.mediators).items() if _of_gate(job, place)}
        _condition(job, masks, units, norms, out, display, judging)
        write_csv(out / VERDICTS, [asdict(one) for one in bridge_verdicts(job, out)])


def _of_gate(job: BridgeJob, place: tuple[str, int]) -> bool:
    return place[0] != "neuron" or place[1] == job.gate.layout.layer


def _sweep(job: Job, out: Path, title: str, display: Display) -> None:
    """A sweep, or what is left of it, with its statistics."""
    with display(title, progress_total(job), "effects") as report:
        run_sweep(job, out, True, report)
    summarise(out, job.model, job.request.top, job.request.seed)


def _masks(job: BridgeJob, out: Path, display: Display) -> tuple[dict[str, Mask], Scores | None]:
    """The masks of the behaviour and of the control behaviours, by name, and the behaviour's scores. What is pruned may be refusals, so
    that no model without them is to be written."""
    scores: dict[str, Scores] = {}
    for name, one in job.scored.items():
        with display(f"scores of {name}", one.batches, "examples") as report:
            run_job(one, out / f"scores-{name}", True, report)
        scores[name] = read_scores(out / f"scores-{name}")
    first = next(iter(scores.values()), None)
    made = {name: select(one, job.rule, tag=ATTACK, preserve=first) for name, one in scores.items()}
    masks = {**made, **job.masks}
    return {name: masks[name] for name in job.names}, scores.get(job.names[0])


def _effects(tables: Mapping[str, xr.Dataset], pairs: np.ndarray | None = None) -> Effects:
    return {place: one for table in tables.values() for place, one in single_effects(table, pairs).items()}


def _enrich(job: BridgeJob, tables: Mapping[str, xr.Dataset], masks: Mapping[str, Mask], scores: Scores | None, out: Path) -> np.ndarray:
    """Writes the tables of enrichment; returns the size of the weights of every neuron of the gate's layer."""
    if not all((out / name).is_file() for name in (ENRICHMENT, CORRELATIONS, UNIT_TABLE)):
        behaviour, *controls = job.names
        how = Counting(job.spec.mediators, PERMUTATIONS, job.gate.request.spec.seed)
        found = enriched(job.gate.model, _effects(tables), masks[behaviour], {name: masks[name] for name in controls}, how, scores)
        write_csv(out / UNIT_TABLE, found.units)
        write_csv(out / CORRELATIONS, found.correlations)
        write_csv(out / ENRICHMENT, found.rows)
    rows = read_csv(out / UNIT_TABLE)
    return np.asarray([float(row["norm"]) for row in rows if (row["unit"], row["layer"]) == ("neuron", str(job.gate.layout.layer))])


def _sets(job: BridgeJob, tables: Mapping[str, xr.Dataset], norms: np.ndarray) -> tuple[UnitSet, ...]:
    """What is patched together, before and after: the mediators that each half of the pairs chooses for the other, and random neurons."""
    found, layer = [], job.gate.layout.layer
    for half in HALVES:
        chosen = strongest(_effects(tables, job.gate.discovery(half)), job.spec.mediators)
        neurons = chosen["neuron", layer]
        heads = [("head_out", at, int(index)) for (kind, at), indices in chosen.items() if kind == "head_out" for index in indices]
        random = matched(neurons, norms, (job.gate.request.spec.seed, 5, half))
        found.append(UnitSet(f"neurons {half + 1}", tuple(("neuron", layer, int(index)) for index in neurons)))
        found.append(UnitSet(f"random {half + 1}", tuple(("neuron", layer, int(index)) for index in random)))
        found.append(UnitSet(f"heads {half + 1}", tuple(heads)))
    return tuple(found)


def _condition(
    job: BridgeJob, masks: Mapping[str, Mask], units: Units, norms: np.ndarray, out: Path, display: Display, judging: Judging
) -> None:
    """Measures the model without some weights, one condition after the other."""
    seed, mask = job.gate.request.spec.seed, masks[job.names[0]]
    neurons = units["neuron", job.gate.layout.layer]
    like = [matched(neurons, norms, (seed, 6, draw)) for draw in range(job.spec.prune_draws)]
    weights = weights_by_name(job.gate.model)
    others = {**masks, RANDOM: random_like(mask, seed), ALIKE: random_alike(mask, weights, seed)}
    conditions = make_conditions(job, others, units, like)
    with display("models without some weights", len(conditions), "models") as report:
        run_conditions(job, conditions, judging.judge, out, report)


def stand_in(job: BridgeJob) -> tuple[UnitSet, ...]:
    """Sets that begin where the real ones will at the earliest, for plans."""
    layer = job.gate.layout.layer
    first: dict[str, Any] = {"neurons": ("neuron", layer, 0), "random": ("neuron", layer, 0), "heads": ("head_out", 0, 0)}
    return tuple(UnitSet(f"{name} {half + 1}", (unit,)) for half in HALVES for name, unit in first.items())


def bridge_cost(job: BridgeJob) -> Cost:
    """What a bridge takes, but for the answers."""
    model, sets = job.gate.model, stand_in(job)
    before = job.sweep(model, units=(), sets=sets, layers=(job.gate.layout.layer,))
    costs = [plan(one).cost for one in (job.heads, before, *job.after(model, sets).values())]
    config, conditions = model.config, 7 + job.spec.prune_draws + len(job.spec.prune_controls)
    token = 2.0 * (config.layers * config.layer_weights + config.vocabulary * config.width)
    sides = [job.heads.contrasts[number] for number in job.measured]
    tokens = sum(len(side.ids) for one in sides for side in (one.base, one.source))
    tokens += sum(len(one.ids) for rows in job.tests.sets.values() for one in rows)
    tokens += sum(len(ids) for _, ids in segments(model.tokenizer, job.tests.text)) if job.tests.text else 0
    costs.append(Cost("conditions", conditions * tokens * token, conditions * 2 * len(sides)))
    numbers = sum(int(np.prod(shape)) for shape in matrix_shapes(config).values())
    for one in job.scored.values():
        passes = sum(len(found) * len(one.plans[which].spans) for which, found in one.sets.items())
        flops = sum(found.flops for found in one.plans.values())
        costs.append(Cost("scores", flops, passes, written=4 * numbers * len(one.kinds)))
    return sum(costs, Cost("bridge"))
