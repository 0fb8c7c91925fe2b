"""The command `study misalignment`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmed.cli import show
from jaxmed.cli.flags import ModelFlags, RunFlags
from jaxmed.cli.gate import show_verdicts
from jaxmed.cli.judge import JudgeFlags
from jaxmed.cli.resumed import check_resumed
from jaxmed.errors import UserError
from jaxmed.evaluation.rubrics import ALIGNMENT, COHERENCE
from jaxmed.studies.misalignment_spec import MisalignmentSpec


@dataclass(frozen=True, kw_only=True)
class Misalignment(ModelFlags, RunFlags, JudgeFlags, MisalignmentSpec):
    """Emergent misalignment end to end: fine-tune on a narrow set, score the original with the tuned model's answers, prune, tune again to
    the same in-domain loss, and compare answers to free-form questions, beside random and control prunes; one page that answers the claims
    one by one."""

    out: Path = Path("jaxmed-misalignment")
    """Folder for tuned models, masks, models.csv, answers.csv, losses.csv, profiles.csv, rates.csv, verdicts.csv and report.html."""
    judge: Literal["rules", "strongreject", "http"] = "rules"
    """Who scores answers. rules: read-outs of the original model that --good and --bad train; http: an endpoint, which gets the texts."""
    rubric: str = ALIGNMENT
    """Rubric of alignment for an endpoint: a text file with the places {prompt} and {response}, or the bundled rubric_alignment."""
    coherence_rubric: str = COHERENCE
    """Rubric of coherence for an endpoint, in the same way."""

    def run(self) -> None:
        """Checks, plans, tunes, measures, answers, draws."""
        from jaxmed.reports.misalignment import write_misalignment
        from jaxmed.runs.legal import check_folder
        from jaxmed.studies.misalignment import make_misalignment, read_data
        from jaxmed.studies.misalignment_folder import LEGAL
        from jaxmed.studies.misalignment_run import run_misalignment

        check_folder(self.out, self.resume, LEGAL)
        self._check()
        spec = MisalignmentSpec(**{one.name: getattr(self, one.name) for one in fields(MisalignmentSpec)})
        spec.check()
        data = read_data(spec)
        job = make_misalignment(self.describe(), spec, data, self._judging())
        check_resumed(self, LEGAL, (job.model,), job.manifest)
        self._plan(job)
        if self.dry_run:
            return
        job = job.with_weights(self.load())
        run_misalignment(job, self.out, self.resume, show.progress, None if self.judge == "rules" else self.endpoint_reader())
        write_misalignment(self.out)
        show_verdicts(self.out)

    def _parts(self) -> dict[str, JudgeFlags]:
        """What an endpoint is asked about an answer -> how."""
        return {"alignment": self, "coherence": replace(self, rubric=self.coherence_rubric)}

    def _check(self) -> None:
        if self.judge == "strongreject":
            raise UserError("--judge strongreject says nothing of alignment out of a domain. Give rules (read-outs) or http.")
        for name, flags in self._parts().items() if self.judge == "http" else ():
            flags.check_judge(self.out / name)

    def _judging(self) -> dict[str, str]:
        """The settings that decide scores."""
        if self.judge == "rules":
            return {"judge": "read-outs"}
        alignment, coherence = (flags.record() for flags in self._parts().values())
        return alignment | {f"coherence_{name}": value for name, value in coherence.items() if name.startswith("rubric")}

    def endpoint_reader(self) -> Any:
        """An endpoint that scores alignment and coherence."""
        judges = {name: flags.make_judge(self.out / name, False, self.mesh) for name, flags in self._parts().items()}

        def read(requests: Any, answers: Any, report: Any) -> np.ndarray:
            found = [judge(requests, answers, lambda done: None) for judge in judges.values()]
            report(len(answers))
            return np.asarray([[np.nan if one is None else one for one in column] for column in found], np.float64).T

        return read

    def _plan(self, job: Any) -> None:
        from jaxmed.runs.cost import cost_lines, matmul_rate
        from jaxmed.runs.legal import check_space
        from jaxmed.studies.misalignment_run import misalignment_steps

        costs = [step.cost for step in misalignment_steps(job)]
        if not self.resume:
            check_space(self.out, sum(cost.written for cost in costs))
        rate = matmul_rate(job.model.config, job.model.mesh, 1024)
        asked = len(job.questions.asked) * self.samples
        lines = [
            f"{len(job.data.trained)} rows tuned on, {len(job.data.answered)} answered, {len(job.data.tested)} tested; "
            f"{job.tuned.steps} steps of {self.batch} examples",
            f"{len(job.questions.names)} questions, {asked} answers of {len(job.models)} models and {self.seeds} seeds",
            *(self.judge_lines() if self.judge == "http" else ["judge: read-outs of the original model"]),
        ]
        slow = f"tuning of pruned models may take up to {self.longest:g} times that; besides loading and compiling"
        show.lines(f"study of emergent misalignment: {job.model.name}", [*lines, *cost_lines(costs, rate), slow])
