"""Scores of every weight of the blocks' matrices, from one pass over examples.

With L_e the mean cross-entropy of the response tokens of example e (so every example weighs the same):

- signed:   S = W * sum_e dL_e/dW      (signed SNIP; removing w changes the summed loss by about -S)
- absolute: A = |W| * sum_e |dL_e/dW|  (absolute value of every example's gradient, then the sum)
- inputs:   root mean square of a matrix's inputs at response tokens (for Wanda: |W| times it; Sun et al. 2024)

Orgad et al. 2026 take S on a behaviour set and A on a preserve set; Wei et al. 2024 take A on both. Sums are float32 whatever the
weights are. Every device adds up its own examples; their sums are added at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.memory import return_freed_memory
from jaxmed.models.model import Model
from jaxmed.models.named_weights import inputs_axis, matrix_shapes
from jaxmed.prompts.examples import Example
from jaxmed.pruning.job import USUAL, Job, make_job, record, token_digest
from jaxmed.pruning.passes import run_pass, scores_of
from jaxmed.pruning.store import ScoreFolder
from jaxmed.runs.watch import RESUMED, Watch, silent


@dataclass
class Scores:
    """Scores by kind and matrix, in memory or in a folder.

    Attributes:
        model, weights: name and weights hash of the scored model.
        shapes: matrix -> its shape in the checkpoint.
        inputs_axis: the axis of those shapes that inputs lie on.
        examples: set -> how many were scored.
        losses: set -> mean loss in nats per response token, over examples.
    """

    model: str
    weights: str
    shapes: dict[str, tuple[int, ...]]
    inputs_axis: int
    examples: dict[str, int]
    losses: dict[str, float]
    tokens: dict[str, str] = field(default_factory=dict)
    held: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)
    folder: ScoreFolder | None = field(default=None, repr=False)

    @property
    def kinds(self) -> list[str]:
        """What was scored: "behaviour_signed", "preserve_absolute", ..."""
        return sorted({*self.held, *(self.folder.kinds() if self.folder else ())})

    @property
    def digest(self) -> str:
        """What tells these scores from others: the weights and the examples' tokens."""
        return hashlib.sha256(repr((self.weights, sorted(self.tokens.items()))).encode()).hexdigest()

    def read(self, kind: str, matrix: str) -> np.ndarray:
        """One matrix's scores, float32, in the shape and order of the checkpoint; of "inputs" a vector.

        Raises:
            UserError: a kind that was not scored; scores that are damaged, or not finite.
        """
        if kind not in self.kinds:
            raise UserError(f"These scores hold no {kind!r}, only {', '.join(self.kinds)}. Score again with --kinds {kind}.")
        found = self.held[kind][matrix] if kind in self.held else self.folder.read(kind, matrix)  # type: ignore[union-attr]
        if not np.isfinite(found).all():
            raise UserError(
                f"The {kind} scores of {matrix} are not all finite, so no mask can be made of them. Look for NaN in the weights."
            )
        return found


def score(
    model: Model,
    behaviour: Sequence[Example],
    preserve: Sequence[Example] = (),
    *,
    kinds: Sequence[str] = USUAL,
    out: str | Path | None = None,
    resume: bool = False,
    report: Watch = silent,
    **how: Any,
) -> Scores:
    """Scores every weight of the blocks' matrices (no embeddings, head, norms, biases).

    Args:
        behaviour, preserve: prompts with responses; the second may be empty where no kind needs it.
        kinds: which sums, as SET_KIND of `SETS` and `KINDS`.
        out: folder that keeps them; None: in memory.
        resume: go on with what `out` holds.
        how: form, scored_separator, max_length (see `texts.encode`); rows, layers_per_pass, remat (see `plan.make_plan`).

    Raises:
        UserError: no examples, or such without responses; a mixture kept as int8; foreign files in `out`; a full disk.
    """
    job = make_job(model, behaviour, preserve, kinds=kinds, **how)
    return run_job(job, None if out is None else Path(out), resume, report)


def run_job(job: Job, out: Path | None = None, resume: bool = False, report: Watch = silent) -> Scores:
    """Runs a job; with `out`, every finished pass is kept there, and `resume` goes on after the last one."""
    folder = None if out is None else ScoreFolder(out)
    job = job.begun(folder.spans()) if folder is not None and resume else job
    model = job.model
    examples = {which: len(found) for which, found in job.sets.items()}
    scores = Scores(model.name, model.identity, matrix_shapes(model.config), inputs_axis(model.config), examples, {})
    scores.tokens = {which: token_digest(found) for which, found in job.sets.items()}
    with nullcontext() if folder is None else folder.session(record(job), resume) as session:
        if folder is not None:
            scores.folder, scores.losses = folder, folder.losses()
        for which, plan in job.plans.items():
            for span in plan.spans:
                if folder is not None and folder.has(which, span):
                    report(plan.batches, 0, RESUMED)
                    continue
                totals, loss = run_pass(job, which, span, report)
                found = scores_of(model, totals, span[0], sum(len(one.ids) - one.prompt for one in job.sets[which]))
                scores.losses[which] = loss
                if folder is None:
                    for kind, matrices in found.items():
                        scores.held.setdefault(f"{which}_{kind}", {}).update(dict(matrices))
                else:
                    folder.write(which, span, found, loss)
                    assert session is not None
                    session.count(passes=1, batches=plan.batches)
                del totals, found  # before the next pass is given as much again
                return_freed_memory()
    return scores


def read_scores(folder: str | Path) -> Scores:
    """The scores that `score` kept in a folder.

    Raises:
        UserError: no scores there, or a run that is not finished.
    """
    held = ScoreFolder(Path(folder))
    found = held.finished()
    shapes = {name: tuple(shape) for name, shape in found["shapes"].items()}
    examples = {which: one["examples"] for which, one in found["sets"].items()}
    tokens = {which: one["tokens_sha256"] for which, one in found["sets"].items()}
    of = found["model"]
    return Scores(of["name"], of["weights"], shapes, found["inputs_axis"], examples, held.losses(), tokens, folder=held)
