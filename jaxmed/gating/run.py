"""A study of a gate in its folder: single effects, then what each half of the pairs has chosen, tested jointly in the other half."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from jaxmed import results, statistics
from jaxmed.effects.cost import plan, progress_total
from jaxmed.effects.job import Job
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.sets import UnitSet, read_sets
from jaxmed.effects.summary import summarise
from jaxmed.effects.sweep import run_sweep
from jaxmed.errors import unknown
from jaxmed.evaluation.judges import Judge, refusal_rules
from jaxmed.files import simple, write_json, write_text
from jaxmed.gating.cases import Chosen, make_sets
from jaxmed.gating.clamp import ANSWERS, CLAMPS, PERPLEXITY, Judging, clamp_perplexity, clamp_verdicts, group_size, read_group, run_clamps
from jaxmed.gating.job import AUTO, GateJob, GateRequest, gate_manifest, make_gate
from jaxmed.gating.rankings import Evidence, measure_features
from jaxmed.gating.spec import GateSpec
from jaxmed.gating.tables import VERDICTS, Measured, enough, gate_rows, read_verdicts, write_tables
from jaxmed.gating.verdicts import Verdict
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.folder import RunFolder
from jaxmed.runs.legal import Legal
from jaxmed.runs.watch import Display, no_display

HALVES = (0, 1)
TABLES = ("gate.csv", VERDICTS, ANSWERS, PERPLEXITY)
SETS = tuple(f"{name}{half + 1}.json" for name in ("sets", "values") for half in HALVES)
KEPT = "answers"
"""What an endpoint's scores are kept beside."""
SWEEPS = ("modules", "neurons", "half1", "half2")
LEGAL = Legal((*SWEEPS, *SETS, *TABLES, f"{KEPT}.scores.jsonl", "report.html"), measured=(*SETS, *TABLES))


RULES = Judging(refusal_rules(), {"judge": "rules"})


def run_gate(job: GateJob, out: Path, resume: bool = False, display: Display = no_display, judging: Judging = RULES) -> None:
    """Runs a study into `out`: four sweeps, judged answers, gate.csv and verdicts.csv. What is finished is on disk at every moment.

    Args:
        judging: of answers; default: refusal rules.

    Raises:
        UserError: `out` holds something else, a study without `resume`, or another one; it is in use, or has no room.
    """
    needed = sum(plan(one).cost.written for one in (*job.singles.values(), *(job.stand_in(half) for half in HALVES)))
    with RunFolder.open(out, judged_manifest(job, judging.settings), resume, LEGAL, needed) as folder, folder.session() as session:
        for name, one in job.singles.items():
            _sweep(one, out / name, name, display)
            session.count(sweeps=1)
        for half in HALVES:
            sets = _sets(job, out, half, display)
            _sweep(job.joint(half, sets), out / f"half{half + 1}", f"joint patches, half {half + 1}", display)
            session.count(sweeps=1)
        found = measured(job, out)
        write_tables(job, found, out, _clamped(job, found, out, judging.judge, display) if job.request.spec.tokens else [])


def judged_manifest(job: GateJob, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two studies the same study: the request, and of answers the settings of their judge."""
    return {**gate_manifest(job), **({"judging": dict(settings)} if job.request.spec.tokens else {})}


def _clamped(job: GateJob, found: Measured, out: Path, judge: Judge, display: Display) -> list[Verdict]:
    """What the group does to answers, where it is clamped."""
    k = group_size(job.layout, enough(job, found)[1])
    groups = [read_group(job, out, half, k) for half in HALVES]
    with display(f"answers, {k} neurons clamped", len(CLAMPS) * int(job.counted.sum()), "answers") as report:
        run_clamps(job, groups, judge, out, report)
    return clamp_verdicts(job, out, k, clamp_perplexity(job, groups, out))


def _sweep(job: Job, out: Path, title: str, display: Display) -> None:
    """A sweep, or what is left of it, with its statistics."""
    with display(title, progress_total(job), "effects") as report:
        run_sweep(job, out, True, report)
    summarise(out, job.model, job.request.top, job.request.seed)


def _sets(job: GateJob, out: Path, half: int, display: Display) -> list[UnitSet]:
    """What is patched in a half; chosen once, and kept."""
    file = out / f"sets{half + 1}.json"
    values = out / f"values{half + 1}.json"
    if not (file.exists() and values.exists()):
        chosen = choose(job, out, half, display)
        means = {side: getattr(chosen.evidence.features, side).mean(axis=0) for side in ("base", "source")}
        write_json(values, simple(means))
        write_text(file, json.dumps([simple(asdict(one)) for one in make_sets(job.cases, job.layout, chosen)]))
    return list(read_sets(file))


def choose(job: GateJob, out: Path, half: int, display: Display = no_display) -> Chosen:
    """What the pairs of the other half say of every neuron, and the upstream modules that they choose."""
    pairs, layout = job.discovery(half), job.layout
    neurons, modules = (results.open_results(out / name).load() for name in ("neurons", "modules"))
    groups = neurons.group.values[pairs]

    def mean(effects: xr.DataArray) -> np.ndarray:
        values = effects.transpose("pair", ...).values[pairs]
        return statistics.group_means(values.reshape(len(pairs), -1), groups)[0].mean(axis=0)

    total = float(mean(modules.source_outcome - modules.base_outcome)[0])
    sign = -1.0 if total < 0 else 1.0
    upstream = {name: (kind, int(np.argmax(sign * mean(modules[kind])[: layout.layer])), 0) for kind, name in AUTO.items()}
    with display("features of neurons", len(pairs), "pairs") as report:
        contrasts = [job.singles["neurons"].contrasts[number] for number in pairs]
        features = measure_features(job.model, contrasts, job.request.outcome, layout.layer, lambda done: report(done, done, ""))
    evidence = Evidence(sign * mean(neurons.neuron.sel(layer=layout.layer)), sign, features, job.request.spec.seed)
    elsewhere = sign * mean(neurons.neuron.sel(layer=layout.control))
    chosen = {name: job.upstream_unit(name, upstream) for name in layout.upstream}
    return Chosen(evidence, elsewhere, chosen, job.request.spec.seed + half)


def measured(job: GateJob, out: Path) -> Measured:
    """The effects of a study, pair by pair, each in the half that had no part in the choice."""
    modules, neurons = (results.open_results(out / name).load() for name in ("modules", "neurons"))
    effects = np.full((len(job.pairs), len(job.cases)), np.nan)
    for half in HALVES:
        table = results.open_results(out / f"half{half + 1}").load()
        effects[job.halves == half] = table.joint.sel(set=[case.name for case in job.cases]).values
    whole = modules.mlp_out.sel(layer=job.layout.layer).values
    total = (modules.source_outcome - modules.base_outcome).values
    singles = neurons.neuron.sel(layer=[job.layout.layer, job.layout.control]).transpose("layer", "pair", ...).values
    return Measured(dict(zip(job.cases, effects.T, strict=True)), total, whole, singles, modules.group.values, job.counted)


class Gated(NamedTuple):
    """What a study of a gate found.

    Attributes:
        verdicts: one per claim.
        rows: those of gate.csv, as numbers.
    """

    verdicts: tuple[Verdict, ...]
    rows: tuple[dict[str, Any], ...]


def gate(
    model: Model,
    pairs: Sequence[PromptPair],
    outcome: OutcomeName = "log-odds",
    position: str | int = "last",
    form: str = "chat",
    contrast: str = "pair",
    source_model: Model | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    **spec: Any,
) -> Gated:
    """Whether a small group of a layer's neurons has most of its effect, and gates what comes before.

    Neurons are ranked in one half of the groups of pairs and patched jointly in the other, and the other way round. The arguments are
    the command's flags.

    Args:
        outcome, position, form, contrast, source_model: as `jm.sweep` takes them; one outcome, and one place.
        out: folder for the sweeps, the chosen sets and the tables; a temporary one by default.
        resume: go on with what `out` holds.
        spec: fields of `jaxmed.gating.spec.GateSpec`: layer, control_layer, upstream, windows, draws, shuffles, sufficient, tokens, text,
            seed.

    Raises:
        UserError: anything in the arguments that cannot be used; nothing has run then.
    """
    if wrong := [name for name in spec if name not in {one.name for one in fields(GateSpec)}]:
        raise unknown("argument of jm.gate", wrong[0], [one.name for one in fields(GateSpec)])
    job = make_gate(model, pairs, GateRequest(GateSpec(**spec), outcome, position, form, contrast), source_model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "gate" if out is None else Path(out)
        run_gate(job, folder, resume)
        return Gated(tuple(read_verdicts(folder)), tuple(gate_rows(job, measured(job, folder))))
