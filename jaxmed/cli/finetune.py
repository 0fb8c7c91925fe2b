"""The command `finetune`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.flags import ModelFlags, RunFlags
from jaxmed.finetuning.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class Finetune(ModelFlags, Recipe, RunFlags):
    """Fine-tunes a model on prompts with responses: adapters or all parameters, loss on the responses alone, resumable to the bit."""

    out: Path = Path("jaxmed-finetune")
    """Folder for losses.csv, losses.html, run.json, checkpoints, and what --save names."""
    save: tuple[Literal["adapter", "model"], ...] = ("adapter", "model")
    """What is written at the end. adapter: a PEFT folder (of lora); model: a Hugging Face folder with everything merged."""

    def run(self) -> None:
        """Checks, plans, trains, writes."""
        from jaxmed.finetuning.folder import CURVE, LEGAL, LOSSES
        from jaxmed.finetuning.job import make_job
        from jaxmed.finetuning.run import finish, run_job
        from jaxmed.reports.curves import write_loss_curve
        from jaxmed.runs.legal import check_folder

        check_folder(self.out, self.resume, LEGAL)
        job = make_job(self.describe(), *self.examples(), self.settings)
        show.lines(f"finetune: {self.model}, {self.dtype}", plan(job))
        if self.dry_run:
            return
        job = replace(job, model=self.load())
        with watch(job) as report:
            tuned = run_job(job, self.out, self.resume, report)
        said = finish(tuned, self.out, self.save)
        ended = f"stopped after step {len(tuned.losses)}: {tuned.stopped}; kept are the parameters of step {tuned.step}"
        curve = write_loss_curve(self.out / LOSSES, self.out / CURVE)
        show.lines("finished", [*([ended] if tuned.stopped else []), f"losses: {curve}", *said])


def plan(job: Any) -> list[str]:
    """The plan of a run with the time it will take at this machine's matmul rate."""
    from jaxmed.axes import row_parts
    from jaxmed.finetuning.job import plan_lines
    from jaxmed.runs.cost import matmul_rate

    rows = job.shape.rows * job.shape.length // row_parts(job.model.mesh)
    return plan_lines(job, matmul_rate(job.model.config, job.model.mesh, rows))


def watch(job: Any) -> AbstractContextManager[Any]:
    """The progress display of a run."""
    return show.progress("finetune", job.steps, "tokens")
