"""The command `study pruning`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmed.cli import show
from jaxmed.cli.flags import LoadFlags, ModelFlags, RunFlags
from jaxmed.runs.legal import check_space
from jaxmed.studies.pruning import PruningStudy


@dataclass(frozen=True, kw_only=True)
class Pruning(LoadFlags, RunFlags, PruningStudy):
    """Targeted pruning end to end: curves, transfer, compression, dissociation and attacks, with figures and tables on one page."""

    out: Path = Path("jaxmed-pruning")
    """Folder for tables, masks, scores and report.html."""

    def run(self) -> None:
        """Plans, runs, draws."""
        from jaxmed.reports.study import write_study
        from jaxmed.studies.pruning_run import PruningFolder, pruning_steps
        from jaxmed.studies.steps import run_steps

        self.check()
        models = self._describe()
        steps = pruning_steps(self, models[0])
        show.lines(f"study of targeted pruning: {', '.join(self.labels)}", self._plan(steps, models[0]))
        if self.dry_run:
            return
        folder = PruningFolder(self, self.out, lambda number: self.source(number).load(), show.progress)
        with folder.begin(self.resume, {"dtype": self.dtype, "int8": self.int8, "template_from": self.template_from}):
            run_steps(steps, folder)
        show.out.print(f"report: {write_study(self.out)}", markup=False)

    def source(self, number: int) -> ModelFlags:
        """How a model of the study is loaded."""
        revision, adapter, mask = (self.each(name)[number] for name in ("revisions", "adapters", "masks"))
        how = {"dtype": self.dtype, "int8": self.int8, "template_from": self.template_from, "mesh": self.mesh}
        paths = {name: Path(path) if path else None for name, path in (("adapter", adapter), ("mask", mask))}
        return ModelFlags(model=self.models[number], revision=revision or None, **paths, **how)

    def _describe(self) -> list[Any]:
        """Every model without weights, once all of it fits the study."""
        from jaxmed.pruning.job import make_job

        models = [self.source(number).describe() for number in range(len(self.models))]
        for model in models:
            source = self.targets[0]
            make_job(model, self.scored(source), self.scored(self.preserve), kinds=self.kinds(source), form=self.form)
        for asked in (self.abilities, self.attack):
            asked.check(models[-1])
        return models

    def _plan(self, steps: list[Any], base: Any) -> list[str]:
        from jaxmed.runs.cost import cost_lines, matmul_rate

        costs = [step.cost for step in steps]
        if not self.resume:
            check_space(self.out, sum(cost.written for cost in costs))
        return [*cost_lines(costs, matmul_rate(base.config, base.mesh, 1024)), "besides loading and compiling"]
