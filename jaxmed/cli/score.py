"""The command `prune score`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.flags import ModelFlags, RunFlags, SetFlags, TrainSplitFlag
from jaxmed.prompts.examples import chosen

Kind = Literal["behaviour_signed", "behaviour_absolute", "behaviour_inputs", "preserve_signed", "preserve_absolute", "preserve_inputs"]


@dataclass(frozen=True, kw_only=True)
class Score(TrainSplitFlag, ModelFlags, SetFlags, RunFlags):
    """Scores every weight of the blocks' matrices in one pass over the examples: signed SNIP on a behaviour, absolute on a preserve set."""

    behaviour: str = "rude"
    """Examples (.jsonl, .csv, .parquet; prompt, response) of the behaviour to remove, or a bundled set."""
    preserve: str = "ordinary"
    """Examples of what is to be kept, or a bundled set."""
    out: Path = Path("jaxmed-scores")
    """Folder for the scores and run.json."""
    kinds: tuple[Kind, ...] = ("behaviour_signed", "preserve_absolute")
    """What is summed over the examples: gradients (signed), their absolute values, or squared inputs (for Wanda)."""
    scored_separator: bool = False
    """Score what stands between prompt and response too."""
    max_length: int = 0
    """Tokens of a scored example at most; a longer one loses its end. 0: as many as the model takes."""
    rows: int = 0
    """Examples per device and batch; 0: as many as keep the matmuls busy."""
    layers_per_pass: int = 0
    """Layers scored in one pass over the data; 0: as many as fit the memory."""
    remat: bool | None = None
    """Run blocks again for their gradients, which saves memory; default: where it is needed to fit."""

    def run(self) -> None:
        """Checks, plans, scores."""
        from jaxmed.pruning.job import make_job
        from jaxmed.pruning.scores import run_job
        from jaxmed.pruning.store import LEGAL
        from jaxmed.runs.legal import check_folder

        check_folder(self.out, self.resume, LEGAL)
        names = ("form", "scored_separator", "max_length", "rows", "layers_per_pass", "remat")
        wanted = {which for which in ("behaviour", "preserve") if any(kind.startswith(which) for kind in self.kinds)}
        sets = {
            which: chosen(getattr(self, which), self.split, self.limit) if which in wanted else [] for which in ("behaviour", "preserve")
        }
        job = make_job(
            self.describe(),
            sets.get("behaviour", []),
            sets.get("preserve", []),
            kinds=self.kinds,
            **{name: getattr(self, name) for name in names},
        )
        show.lines(f"prune score: {self.model}, {self.dtype}", plan_lines(job))
        if self.dry_run:
            return
        job = replace(job, model=self.load())
        with show.progress("scores", job.batches, "examples") as report:
            scores = run_job(job, self.out, self.resume, report)
        losses = [
            f"{which}: {scores.examples[which]} examples, mean loss {loss:.4f} nats per token" for which, loss in scores.losses.items()
        ]
        show.lines("finished", [*losses, f"scores: {self.out}"])


def plan_lines(job: Any) -> list[str]:
    """The cost of a scoring run, in words."""
    from jaxmed.axes import row_parts
    from jaxmed.runs.cost import Cost, cost_lines, matmul_rate

    lines: list[str] = []
    costs: list[Cost] = []
    for which, plan in job.plans.items():
        found = job.sets[which]
        tokens, scored = sum(len(one.ids) for one in found), sum(len(one.ids) - one.prompt for one in found)
        shapes = ", ".join(f"{one.shape.rows} x {one.shape.length}" for one in plan.groups)
        again = ", blocks run again" if plan.remat else ""
        lines.append(
            f"{which}: {len(found)} examples, {tokens:,} tokens, {scored:,} of them responses; {len(plan.spans)} x {plan.batches} batches "
            f"of {shapes} tokens{again}"
        )
        costs.append(Cost(f"scores of {which}", plan.flops, len(found) * len(plan.spans), peak=plan.bytes, written=job.bytes_of(which)))
        cut = sum(one.cut > 0 for one in found)
        lines += [f"{which}: {cut} responses are longer than the limit of tokens and lose their end"] if cut else []
    first = next(iter(job.plans.values())).groups[-1].shape
    rate = matmul_rate(job.model.config, job.model.mesh, first.rows * first.length // row_parts(job.model.mesh))
    return [*lines, *cost_lines(costs, rate)]
