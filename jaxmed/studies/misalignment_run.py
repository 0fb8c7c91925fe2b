"""A study of emergent misalignment as a list of steps, and its run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jaxmed.errors import UserError
from jaxmed.experiments.misalignment import Reader
from jaxmed.runs.cost import Cost
from jaxmed.runs.folder import RunFolder
from jaxmed.runs.watch import Display, no_display
from jaxmed.studies.misalignment import ORIGINAL, TUNED, MisalignmentJob, score_bytes, work
from jaxmed.studies.misalignment_folder import LEGAL, MisalignmentFolder
from jaxmed.studies.steps import Step, run_steps


def misalignment_steps(job: MisalignmentJob) -> list[Step]:
    """The steps of a study with what they cost; models that are pruned may take up to `longest` times the steps."""
    flops, steps = work(job), []

    def cost(title: str, *kinds: str) -> Cost:
        return Cost(title, sum(flops[kind][0] for kind in kinds), sum(flops[kind][1] for kind in kinds))

    def add(name: str, needs: tuple[str, ...], of: Cost, run: Callable[[MisalignmentFolder], None]) -> None:
        steps.append(Step(name, needs, of, run))

    scores = replace(cost("scores of preserve and control sets, read-outs", "score", "fit"), written=score_bytes(job))
    add(scores.title, (), scores, MisalignmentFolder.score)
    for seed in job.spec.all_seeds:
        name = f"seed {seed}: tune, answer, score"
        add(name, (scores.title,), cost(name, "tune", "behaviour"), lambda folder, seed=seed: folder.behave(seed))
        for model in job.models:
            title = f"seed {seed}: {model}"
            kinds = ("measure", "profile") if model in (ORIGINAL, TUNED) else ("tune", "measure", "profile")
            add(title, (name,), cost(title, *kinds), lambda folder, seed=seed, model=model: folder.measure(model, seed))
    return [*steps, Step("claims", tuple(step.name for step in steps), Cost("claims"), MisalignmentFolder.claims)]


def run_misalignment(
    job: MisalignmentJob, out: Path, resume: bool = False, display: Display = no_display, judge: Reader | None = None
) -> None:
    """Runs a study into `out`. What is finished is on disk at every moment.

    Args:
        judge: of answers; default: the read-outs, which need `good` and `bad` rows.

    Raises:
        UserError: `out` holds something else, a study without `resume`, or another one; it is in use, or has no room; no judge.
    """
    if judge is None and not job.data.good:
        raise UserError("Nobody judges the answers. Give --good and --bad sets for the read-outs, or a judge.")
    steps = misalignment_steps(job)
    needed = sum(step.cost.written for step in steps)
    with RunFolder.open(out, job.manifest(), resume, LEGAL, needed) as folder, folder.session():
        run_steps(steps, MisalignmentFolder(job, out, display, judge))
