"""The command `sweep`, and what other commands use of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.contrast import ContrastFlags, PairsFlag
from jaxmed.cli.flags import HostsFlags, RunFlags
from jaxmed.cli.method import choose_method
from jaxmed.cli.report import write_report
from jaxmed.cli.resumed import check_resumed


@dataclass(frozen=True, kw_only=True)
class SweepFlags(ContrastFlags):
    """What is swept: the flags that `sweep` and `check` share."""

    outcome: tuple[str, ...] = ("log-odds",)
    """One or several of: logit-diff, log-odds, logprob, prefix-gap, sequence-logprob, kl (units: nats, logit-diff: logits)."""
    position: str = "last"
    """Patched tokens: last, user_last, header, user, each, spans, all, an index (negative counts from the end), or a substring."""
    unit: tuple[str, ...] = ()
    """One or several of: neuron, gate, up (a gated neuron's two branches), window, head_out, attention_out, mlp_out, both_out (these two of
    a layer together), residual_out. By default neuron, or none where --sets or --paths are given."""
    window: int = 32
    """Adjacent neurons per window, for the unit 'window'."""
    layers: tuple[int, ...] = ()
    """Layers to sweep, such as 9,19,20-29; empty: all."""
    estimand: tuple[str, ...] = ("indirect",)
    """One or several of: indirect, direct, total, interaction (natural effects; those but indirect run the turned pair too), to_logits
    (what the unit writes into the logits itself), via_later (what later layers make of it), both_ways (the rest of the indirect effect)."""
    patch: Literal["resample", "zero", "mean", "noise", "scale", "steer", "ablate-direction"] = "resample"
    """What is written in the place of a unit's base value: resample, its value in source; zero; mean, its mean over the source runs of all
    pairs, at their patched tokens; noise, base's value plus Gaussian noise; scale, a multiple of base's value; steer, base's value plus a
    multiple of the mean of source minus base over all pairs; ablate-direction, base's value without its component along that mean."""
    patch_factor: float | None = None
    """The number of noise (standard deviations; default 3), scale (default 2) and steer (default 1)."""
    reference: str = ""
    """With --patch mean: folder of `jaxmed cache write`; means are taken over its prompts and tokens instead."""
    sets: Path | None = None
    """JSON list of units that are patched together, and perhaps of others that keep their base values meanwhile:
    [{"name": "gate", "units": [["neuron", 29, 17], ["head_out", 3, 2]], "held": [["mlp_out", 11]]}]."""
    layer_window: int = 0
    """Number of adjacent layers whose attention outputs, MLP outputs, or both, are patched together, wherever they begin; 0: none."""
    paths: Path | None = None
    """JSON list of paths: [{"name": "p", "sender": ["neuron", 5, 17], "receivers": [["head_out", 9, 1], ["mlp_out", 11]]}]."""
    direction: Literal["forward", "reverse"] = "forward"
    """Which run is patched: forward, the base; reverse, the source, with base's values."""

    def job(self, model: Any, pairs: Sequence[Any], source_model: Any = None, **summary: Any) -> Any:
        """The checked job on a model, which needs no weights.

        Raises:
            UserError: what cannot be swept, of all pairs together.
        """
        from jaxmed.effects.job import make_job
        from jaxmed.effects.request import Request
        from jaxmed.effects.sets import layer_windows, read_paths, read_sets

        sets = () if self.sets is None else read_sets(self.sets)
        sets += layer_windows(model.config.layers, self.layer_window) if self.layer_window else ()
        paths = () if self.paths is None else read_paths(self.paths)
        return make_job(
            model,
            pairs,
            Request(
                outcomes=self.outcome,
                units=self.unit or (() if sets or paths else ("neuron",)),
                patch=self.patch,
                patch_factor=self.patch_factor,
                reference=self.reference,
                sets=sets,
                paths=paths,
                position=self.position,
                window=self.window,
                layers=self.layers or None,
                form=self.form,
                estimands=self.estimand,
                contrast=self.contrast or ("pair" if source_model is None else "model"),
                direction=self.direction,
                **summary,
            ),
            source_model,
        )


@dataclass(frozen=True, kw_only=True)
class Sweep(PairsFlag, SweepFlags, HostsFlags, RunFlags):
    """Effects of every unit on an outcome, exact or estimated: effect = y(base; unit := its value in source) - y(base)."""

    out: Path = Path("jaxmed-sweep")
    """Folder for effects.zarr, run.json, top.csv and report.html."""
    method: Literal["auto", "exact", "screened", "attribution", "attribution-star", "relp", "mean-gradient", "integrated"] = "auto"
    """How effects come about. exact: a restarted pass for every unit. screened: estimates of all units, and exact effects of those that
    are, or may be, among the --top largest of a pair. The others are estimates of all units at once. attribution: the unit's change times
    the gradient at base, from two forwards and a backward. attribution-star: the same, and beside it a value without a sign, from
    backwards that skip a layer each. relp: relevance propagation instead of the gradient. mean-gradient: the mean of the gradients at base
    and at source. integrated: the mean gradient over --points on the way of one layer's units from base to source, which takes that many
    backwards per layer. auto: exact where the plan is under ten minutes, else screened where that is possible."""
    budget: str = "2%"
    """Limit of the exact effects of --method screened: a part of the FLOPs of all of them (2%), FLOPs (3e13 flop), or time (20m)."""
    points: int = 5
    """Points of --method integrated, 1 to 64, placed by the Gauss-Legendre rule."""
    top: int = 50
    """Units of each kind that are listed in top.csv; with --method screened also how many of the largest are looked for."""
    by: Literal["", "category"] = ""
    """category: statistics, rows of top.csv and tables for every category of pairs, too."""
    seed: int = 0
    """Seed of resamples and sign flips, and of --patch noise."""

    def run(self) -> None:
        """Checks, plans, sweeps, summarises, reports."""
        from jaxmed.effects.job import manifest
        from jaxmed.hosts import first_tells, leads
        from jaxmed.results import LEGAL
        from jaxmed.runs.legal import check_folder

        self.join()
        first_tells(lambda: check_folder(self.out, self.resume, LEGAL))
        summary = {"seed": self.seed, "top": self.top, "by": self.by, "budget": self.budget, "points": self.points}
        summary["method"] = "exact" if self.method == "auto" else self.method
        _, job = self.checked(self.pairs, lambda model, pairs, other: self.job(model, pairs, other, **summary))
        if self.method == "auto":
            job = choose_method(job, self.out if self.resume else None)
        same = partial(manifest, job)
        first_tells(lambda: check_resumed(self, LEGAL, (job.model, job.source_model), same, ("chunk",)) or 0.0)
        if self.dry_run:
            show_plan(job, "sweep", self.out if self.resume else None)
            return
        source = self.source()
        ranked = sweep_job(job.with_weights(self.load(), None if source is None else source.load()), self.out, self.resume)
        if not leads():
            return
        write_report([self.out], self.out / "report.html")
        show.top_units(self.out, ranked)
        show_stability(self.out)


def show_stability(folder: Path) -> None:
    """Prints how far the ranking is the same for other pairs, and the margin of null pairs, where the table says so; of a screened sweep,
    what was computed."""
    from jaxmed.reports.screen import screen
    from jaxmed.reports.stability import stability
    from jaxmed.results import open_results

    table = open_results(folder, check=False)
    for title, told in (("What is exact", screen(table)), ("The ranking and other pairs", stability(table))):
        if told:
            show.lines(title, [f"{label}: {line}" for label, line in told])


def show_plan(job: Any, title: str, out: Path | None = None) -> float:
    """Prints what a job will cost, without what a run in `out` has finished; returns this machine's matmul rate, in FLOP/s."""
    from jaxmed.distributed import device_name
    from jaxmed.effects.cost import plan
    from jaxmed.effects.job import estimate_rate

    rate = estimate_rate(job)
    show.lines(f"{title}: {job.model.name}, {job.model.config.dtype}, {device_name(job.model.mesh)}", plan(job, rate, out).lines())
    return rate


def sweep_job(job: Any, out: Path, resume: bool, title: str = "sweep") -> str:
    """Prints the plan of a job, then runs and summarises it; returns what its units are ranked by."""
    from jaxmed.effects.cost import progress_total
    from jaxmed.effects.methods import METHODS
    from jaxmed.effects.summary import summarise
    from jaxmed.effects.sweep import run_sweep

    rate = show_plan(job, title, out if resume else None)
    counted = "effects" if (method := METHODS[job.request.method]).exact else method.values
    with show.progress(title, progress_total(job), counted) as report:
        run_sweep(job, out, resume, report, rate)
    table = summarise(out, job.model, job.request.top, job.request.seed, job.request.by)
    return next(str(one.attrs["ranked"]) for one in table.data_vars.values() if "ranked" in one.attrs)
