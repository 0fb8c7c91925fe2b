"""The command `finetune`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype, load_model
from jaxmed.finetuning.settings import Recipe
from jaxmed.models.catalog import DEFAULT


@dataclass(frozen=True)
class Finetune(Recipe):
    """Fine-tunes a model on prompts with responses: adapters or all parameters, loss on the responses alone, resumable to the bit."""

    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    out: Path = Path("jaxmed-finetune")
    """Folder for losses.csv, losses.html, run.json, checkpoints, and what --save names."""
    save: tuple[Literal["adapter", "model"], ...] = ("adapter", "model")
    """adapter: a PEFT folder (of lora). model: a Hugging Face folder with everything merged."""
    dtype: Dtype = "float32"
    """Weights and matmuls; what is trained, and the optimiser's state, are float32 in both."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    resume: bool = False
    """Go on with what --out holds."""
    dry_run: bool = False
    """Print the plan and stop."""
    config: Config = None

    def run(self) -> None:
        """Checks, plans, trains, writes."""
        from jaxmed.finetuning.folder import CURVE, LEGAL, LOSSES
        from jaxmed.finetuning.job import check
        from jaxmed.finetuning.run import finish, run
        from jaxmed.reports.curves import write_loss_curve
        from jaxmed.runs.folder import check_folder

        check_folder(self.out, self.resume, LEGAL)
        model = load_model(self.model, self.dtype, self.revision, self.mesh, weights=not self.dry_run)
        job = check(model, *self.examples(), self.settings)
        show.lines(f"finetune: {self.model}, {self.dtype}", plan(job))
        if self.dry_run:
            return
        with watch(job) as report:
            tuned = run(job, self.out, self.resume, report)
        said = finish(tuned, self.out, self.save)
        ended = f"stopped after step {len(tuned.losses)}: {tuned.stopped}; kept are the parameters of step {tuned.step}"
        curve = write_loss_curve(self.out / LOSSES, self.out / CURVE)
        show.lines("finished", [*([ended] if tuned.stopped else []), f"losses: {curve}", *said])


def plan(job: Any) -> list[str]:
    """The plan of a run with the time it will take at this machine's matmul rate."""
    from jaxmed.finetuning.job import plan_lines, total_flops
    from jaxmed.runs.cost import matmul_rate

    rows = job.shape.rows * job.shape.length // job.model.mesh.shape["data"]
    return plan_lines(job, total_flops(job) / matmul_rate(job.model.config, job.model.mesh, rows))


def watch(job: Any) -> AbstractContextManager[Any]:
    """The progress display of a run."""
    return show.progress("finetune", job.steps, "tokens")
