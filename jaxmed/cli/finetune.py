"""The command `finetune`."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype, load_model
from jaxmed.models.catalog import DEFAULT


@dataclass(frozen=True)
class Finetune:
    """Fine-tunes a model on prompts with responses: adapters or all parameters, loss on the responses alone, resumable to the bit."""

    data: str = "alignment"
    """Examples file (.jsonl, .csv, .parquet; prompt, response, ...), or a bundled set: alignment. Rows of split heldout are left out."""
    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    out: Path = Path("jaxmed-finetune")
    """Folder for losses.csv, losses.html, run.json, checkpoints, and what --save names."""
    save: tuple[Literal["adapter", "model"], ...] = ("adapter", "model")
    """adapter: a PEFT folder (of lora). model: a Hugging Face folder with everything merged."""
    heldout: str = ""
    """Examples file of the held-out loss; empty: a share of --data."""
    heldout_share: float = 0.1
    """That share."""
    method: Literal["lora", "full"] = "lora"
    """Adapters on the blocks' matrices, or every parameter."""
    rank: int = 16
    """Of the adapters."""
    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank."""
    stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    targets: tuple[str, ...] = ()
    """Adapted matrices by the last part of their names, such as q_proj v_proj; empty: all of the blocks."""
    learning_rate: float = 2e-4
    """At its highest."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Of the learning rate after the warm-up."""
    warmup: int = 10
    """Steps in which the learning rate rises from zero."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int = 0
    """Optimiser steps, instead of --epochs; 0: by --epochs."""
    batch: int = 8
    """Examples per optimiser step."""
    accumulate: int = 1
    """Microbatches per optimiser step."""
    clip: float = 1.0
    """Largest norm of a gradient; 0: no clipping."""
    weight_decay: float = 0.0
    """Of AdamW, on matrices."""
    packing: bool = True
    """Several examples may share a row of tokens, without seeing each other."""
    raw: bool = False
    """Prompt, newline, response, without the chat template."""
    max_length: int = 0
    """Limit of an example's tokens; what is longer loses its end. 0: the model's."""
    remat: bool = False
    """Run blocks again for their gradients, to save memory."""
    evaluate_every: int = 0
    """Steps between held-out losses; 0: a tenth of the steps."""
    patience: int = 0
    """Stop after so many held-out losses without a new best, and keep the best; 0: never."""
    save_every: int = 0
    """Steps between checkpoints; 0: a fifth of the steps."""
    dtype: Dtype = "float32"
    """Weights and matmuls; what is trained, and the optimiser's state, are float32 in both."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    seed: int = 0
    """Of the data's order, the held-out share and fresh adapters."""
    resume: bool = False
    """Go on with what --out holds."""
    dry_run: bool = False
    """Print the plan and stop."""
    config: Config = None

    def run(self) -> None:
        """Checks, plans, trains, writes."""
        from jaxmed.finetuning.recipe import COMMAND_ONLY, make_job, recipe_from
        from jaxmed.finetuning.run import check_folder, finish, run

        check_folder(self.out, self.resume)
        model = load_model(self.model, self.dtype, self.revision, self.mesh, weights=not self.dry_run)
        given = {key: value for key, value in vars(self).items() if key not in COMMAND_ONLY | {"config", "dry_run"}}
        job = make_job(recipe_from(given), model)
        show.lines(f"finetune: {self.model}, {self.dtype}", plan(job))
        if self.dry_run:
            return
        begun = time.perf_counter()
        with watch(job) as report:
            tuned = run(job, self.out, self.resume, report)
        said = finish(tuned, self.out, self.save, time.perf_counter() - begun)
        ended = f"stopped after step {len(tuned.losses)}: {tuned.stopped}; kept are the parameters of step {tuned.step}"
        show.lines("finished", [*([ended] if tuned.stopped else []), f"losses: {draw_losses(self.out)}", *said])


def draw_losses(out: Path) -> Path:
    """Draws the loss curve of a run folder."""
    from jaxmed.finetuning.run import CURVE, LOSSES
    from jaxmed.reports.curves import write_loss_curve

    return write_loss_curve(out / LOSSES, out / CURVE)


def plan(job: Any) -> list[str]:
    """The plan of a run with the time it will take at this machine's matmul rate."""
    from jaxmed.finetuning.run import plan_lines, step_flops
    from jaxmed.plan import matmul_rate

    rows = job.shape.rows * job.shape.length // job.model.mesh.shape["data"]
    return plan_lines(job, job.steps * step_flops(job) / matmul_rate(job.model.config, job.model.mesh, rows))


def watch(job: Any) -> AbstractContextManager[Any]:
    """The progress display of a run."""
    return show.progress("finetune", job.steps, "tokens")
