"""The command `answers`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxmed.answering.spec import AnswersSpec
from jaxmed.cli import show
from jaxmed.cli.contrast import ContrastFlags, PairsFlag
from jaxmed.cli.flags import RunFlags
from jaxmed.cli.gate import judging, show_verdicts
from jaxmed.cli.judge import JudgeFlags
from jaxmed.cli.resumed import check_resumed
from jaxmed.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Answers(PairsFlag, ContrastFlags, RunFlags, JudgeFlags, AnswersSpec):
    """How prompts are answered, and how often refused, while sets of units are patched: judged answers, with paired intervals and random
    sets beside them. A logit outcome is not what a model writes."""

    sets: Path | None = None
    """JSON list of units that are patched together: [{"name": "gate", "units": [["neuron", 29, 17], ["head_out", 3, 2]]}]."""
    save_text: bool = False
    """Keep the answers in answers.csv; otherwise only their hashes are kept."""
    out: Path = Path("jaxmed-answers")
    """Folder for answers.csv, effects.csv, verdicts.csv and report.html."""

    def run(self) -> None:
        """Checks, plans, answers, judges, draws."""
        from jaxmed.answering.job import make_answers
        from jaxmed.answering.run import KEPT, LEGAL, answers_manifest, run_answers
        from jaxmed.effects.sets import read_sets
        from jaxmed.reports.answers import write_answers
        from jaxmed.runs.legal import check_folder

        check_folder(self.out, self.resume, LEGAL)
        if self.sets is None:
            raise UserError('Give --sets FILE.json: [{"name": "a", "units": [["neuron", 29, 17]]}].')
        sets = read_sets(self.sets)
        spec = AnswersSpec(**{one.name: getattr(self, one.name) for one in fields(AnswersSpec)})
        spec.check()
        _, job = self.checked(
            self.pairs, lambda model, pairs, other: make_answers(model, pairs, sets, spec, self.contrast, self.form, other)
        )
        self.check_judge(self.out / KEPT)
        same = lambda: answers_manifest(job, self.record(), self.save_text)  # noqa: E731
        check_resumed(self, LEGAL, (job.model, job.source_model), same)
        self._plan(job)
        if self.dry_run:
            return
        source = self.source()
        job = job.with_weights(self.load(), None if source is None else source.load())
        by = judging(self, self.out / KEPT, self.save_text)
        run_answers(job, self.out, self.resume, by.judge, by.settings, self.save_text, show.progress)
        write_answers(self.out)
        show_verdicts(self.out)

    def _plan(self, job: Any) -> None:
        each = len(job.pairs) * job.spec.samples
        drawn = f"{job.spec.samples} samples at temperature {job.spec.temperature:g}" if job.spec.temperature else "greedy"
        tokens, flops = job.size()
        lines = [
            f"{len(job.pairs)} pairs, {len(job.sets)} sets (random ones included), {drawn}",
            f"{each * len(job.conditions):,} answers of up to {job.spec.tokens} tokens: base and source as they are, base under every set",
            f"at most {tokens:,} tokens to write, {flops / 1e12:,.2f} TFLOP of matmuls",
            *self.judge_lines(),
        ]
        show.lines(f"answers: {job.model.name}" + (f", values of {job.source_model.name}" if job.source_model else ""), lines)
