"""The command `study mediation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxmed.bridge.spec import BridgeSpec
from jaxmed.cli import show
from jaxmed.cli.contrast import ContrastFlags, OneOutcomeFlag, PairsFlag
from jaxmed.cli.flags import RunFlags
from jaxmed.cli.gate import judging, show_verdicts
from jaxmed.cli.judge import JudgeFlags
from jaxmed.cli.resumed import check_resumed
from jaxmed.errors import UserError
from jaxmed.studies.mediation_spec import MediationSpec


@dataclass(frozen=True, kw_only=True)
class Mediation(OneOutcomeFlag, PairsFlag, ContrastFlags, RunFlags, JudgeFlags, MediationSpec, BridgeSpec):
    """Causal mediation end to end: where the request is read and the answer written, by which layers and modules, whether a few neurons of
    the last layer gate it, with controls; with --prune, whether the weights that carry a behaviour sit there; one page that answers the
    claims one by one."""

    out: Path = Path("jaxmed-mediation")
    """Folder for the sweeps, the study of the gate, verdicts.csv and report.html."""

    def run(self) -> None:
        """Checks, plans, measures, answers, draws."""
        from jaxmed.gating.run import KEPT
        from jaxmed.models.catalog import needs_building
        from jaxmed.prompts import read_pairs
        from jaxmed.prompts.readers import read_text
        from jaxmed.reports.mediation import write_mediation
        from jaxmed.runs.legal import check_folder
        from jaxmed.studies.mediation import LEGAL, make_mediation, run_mediation

        controls = [self.opened(pair) for pair in read_pairs(self.controls)] if self.controls else []
        check_folder(self.out, self.resume, LEGAL)
        source = self.source()
        contrast = self.contrast or ("pair" if source is None else "model")
        spec = MediationSpec(**{one.name: getattr(self, one.name) for one in fields(MediationSpec)})
        bridge = BridgeSpec(**{one.name: getattr(self, one.name) for one in fields(BridgeSpec)})

        if not self.prune and (given := [one.name for one in fields(BridgeSpec) if getattr(self, one.name) != one.default]):
            raise UserError(f"--{given[0].replace('_', '-')} goes with --prune alone, which names the behaviour that is pruned for.")

        def made(model: Any, pairs: Sequence[Any], other: Any) -> Any:
            job = make_mediation(model, pairs, controls, spec, self.outcome, self.form, contrast, other)
            return job.with_bridge(bridge, needs_building(self.model)) if self.prune else job

        _, job = self.checked(self.pairs, made)
        kept = self.out / "gate" / KEPT
        if self.tokens:
            self.check_judge(kept)
            read_text(self.text or "neutral")
        check_resumed(self, LEGAL, (job.model, job.gate.source_model), job.manifest)
        self._plan(job)
        if self.dry_run:
            return
        job = job.with_weights(self.load(), None if source is None else source.load())
        run_mediation(job, self.out, self.resume, show.progress, judging(self, kept))
        write_mediation(self.out)
        show_verdicts(self.out)

    def _plan(self, job: Any) -> None:
        from jaxmed.effects.job import estimate_rate
        from jaxmed.runs.cost import cost_lines
        from jaxmed.studies.mediation import mediation_steps

        steps = mediation_steps(job, done=self.out if self.resume else None)
        lines = cost_lines([step.cost for step in steps], estimate_rate(job.gate.singles["neurons"]))
        answers = self.judge_lines() if self.tokens else []
        show.lines(f"study of mediation: {job.model.name}", [*lines, *answers, "besides loading, compiling and answers"])
