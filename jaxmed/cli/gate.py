"""The command `gate`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxmed.cli import show
from jaxmed.cli.contrast import ContrastFlags, OneOutcomeFlag, PairsFlag
from jaxmed.cli.flags import RunFlags
from jaxmed.cli.judge import JudgeFlags
from jaxmed.cli.resumed import check_resumed
from jaxmed.files import read_csv
from jaxmed.gating.spec import GateSpec


@dataclass(frozen=True, kw_only=True)
class Gate(OneOutcomeFlag, PairsFlag, ContrastFlags, RunFlags, JudgeFlags, GateSpec):
    """From single effects to a verdict: does a small group of a layer's neurons have most of its effect, on pairs that did not choose them,
    and does it gate what comes from before? With random, other-layer and shuffled controls, and other rankings beside ours."""

    position: str = "last"
    """Patched tokens: last, user_last, header, user, all, an index (negative counts from the end), or a substring."""
    out: Path = Path("jaxmed-gate")
    """Folder for the sweeps, the chosen sets, gate.csv, verdicts.csv and report.html."""

    def run(self) -> None:
        """Checks, plans, measures, judges, draws."""
        from jaxmed.gating.job import make_gate
        from jaxmed.gating.run import KEPT, LEGAL, judged_manifest, run_gate
        from jaxmed.prompts.readers import read_text
        from jaxmed.reports.gate import write_gate
        from jaxmed.runs.legal import check_folder

        check_folder(self.out, self.resume, LEGAL)
        _, job = self.checked(self.pairs, lambda model, pairs, other: make_gate(model, pairs, self.request(), other))
        if self.tokens and self.text:
            read_text(self.text)
        if self.tokens:
            self.check_judge(self.out / KEPT)
        check_resumed(self, LEGAL, (job.model, job.source_model), lambda: judged_manifest(job, self.record()))
        self._plan(job)
        if self.dry_run:
            return
        source = self.source()
        job = job.with_weights(self.load(), None if source is None else source.load())
        run_gate(job, self.out, self.resume, show.progress, judging(self, self.out / KEPT))
        write_gate(self.out)
        show_verdicts(self.out)

    def request(self) -> Any:
        """What is asked, in the words of the package."""
        from jaxmed.gating.job import GateRequest

        spec = GateSpec(**{one.name: getattr(self, one.name) for one in fields(GateSpec)})
        contrast = self.contrast or ("pair" if self.source() is None else "model")
        return GateRequest(spec, self.outcome, self.position, self.form, contrast)

    def _plan(self, job: Any) -> None:
        from jaxmed.effects.cost import plan
        from jaxmed.effects.job import estimate_rate
        from jaxmed.gating.clamp import CLAMPS
        from jaxmed.runs.watch import show_time

        parts = [*job.singles.items(), ("half1", job.stand_in(0)), ("half2", job.stand_in(1))]
        names = {"half1": "first half, jointly", "half2": "second half, jointly"}
        rate = estimate_rate(job.singles["neurons"])
        plans = {names.get(name, name): plan(one, rate, self.out / name if self.resume else None) for name, one in parts}
        lines = [f"{name}: pairs {one.pairs}, effects {one.effects:,}, {one.cost.flops / 1e12:.2f} TFLOP" for name, one in plans.items()]
        seconds = sum(one.seconds or 0.0 for one in plans.values())
        answers = len(CLAMPS) * int(job.counted.sum())
        lines += [f"{answers} answers of up to {self.tokens} tokens", *self.judge_lines()] if self.tokens else []
        besides = ", and the answers" * bool(self.tokens)
        lines.append(f"about {show_time(seconds)} at this machine's matmul rate ({rate / 1e9:,.0f} GFLOP/s){besides}")
        show.lines(f"gate: {job.model.name}, neurons of layer {job.layout.layer}", lines)


def judging(flags: Any, kept: Path, keep_text: bool = False) -> Any:
    """Who judges the answers, by the flags of a command; scores of an endpoint are kept beside `kept`. Rules, where nothing is written."""
    from jaxmed.gating.clamp import Judging
    from jaxmed.gating.run import RULES

    return Judging(flags.make_judge(kept, keep_text, flags.mesh), flags.record()) if flags.tokens else RULES


def show_verdicts(folder: Path) -> None:
    """Prints the verdicts of a study's folder."""
    from jaxmed.reports.verdicts import numbers

    rows = [[row["claim"], row["verdict"], f"{numbers(row)} {row['unit']}", row["why"]] for row in read_csv(folder / "verdicts.csv")]
    show.table("verdicts", ["claim", "verdict", "estimate", "why"], rows, left=4)
    show.out.print(f"report: {folder / 'report.html'}", markup=False)
