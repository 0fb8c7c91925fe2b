"""Fine-tuning from examples to a model: run step by step, resumable to the bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.batching.batches import Batch, scored_tokens
from jaxmed.errors import UserError
from jaxmed.finetuning import checkpoint
from jaxmed.finetuning.feed import Feed
from jaxmed.finetuning.folder import COLUMNS, LEGAL, write_losses
from jaxmed.finetuning.job import Job, make_job, manifest
from jaxmed.finetuning.lora import Factors, lay_out, merge, save_adapter
from jaxmed.finetuning.settings import Settings, make_settings
from jaxmed.finetuning.train import learning_rates, make_evaluation, make_optimiser, make_step, start
from jaxmed.models.checkpoints.edit_record import refuse_attacks
from jaxmed.models.checkpoints.export import export_folder
from jaxmed.models.model import Model
from jaxmed.models.params import param_dtype
from jaxmed.prompts.examples import Example
from jaxmed.runs import signals
from jaxmed.runs.folder import RunFolder, Session, hold, read_run, seconds_spent
from jaxmed.runs.watch import RESUMED, Watch, silent

TRAINED = "trained"
"""Status of a run whose steps are done, and whose results are not written yet."""


@dataclass
class FinetuneResult:
    """What fine-tuning gives.

    Attributes:
        model: the fine-tuned model, adapters merged; ready for any other call.
        losses: one row per step (`COLUMNS`); `heldout_loss` is NaN where it was not measured. Units: nats per response token.
        factors: the adapter alone; None after full fine-tuning.
        step: the step whose parameters these are.
    """

    model: Model
    losses: list[dict[str, float]]
    settings: Settings
    factors: Factors | None = None
    step: int = 0
    stopped: str = ""
    base: Model | None = field(default=None, repr=False)

    def save_adapter(self, folder: str | Path) -> Path:
        """Writes the adapter as a folder that PEFT reads; raises a UserError after full fine-tuning."""
        if self.factors is None or self.base is None:
            raise UserError("Full fine-tuning has no adapter; export the model instead.")
        return save_adapter(self.base, self.factors, self.settings.lora, folder)


@dataclass
class _Stand:
    """Where a run stands.

    Attributes:
        point: (steps done, what is trained, optimiser state): one assignment, so that an interrupt never parts them.
        best: the parameters of the best held-out loss, where patience asks for them.
        progress: rows of losses, and what early stopping counts.
    """

    point: tuple[int, Any, Any]
    best: Any = None
    progress: dict[str, Any] = field(default_factory=lambda: {"rows": [], "best": None, "best_step": 0, "since": 0, "stopped": ""})


def run_job(job: Job, out: Path | None = None, resume: bool = False, report: Watch = silent) -> FinetuneResult:
    """Runs a job. With `out`, where it stands is kept there, and an interrupted run goes on with `resume`, equal to the bit.

    Raises:
        UserError: `out` holds something else, a run without `resume`, or a run of other settings, data or weights; another writer in it;
            a damaged checkpoint; a full disk; a loss that is not finite.
    """
    if out is None:
        return _train(job, None, None, report)
    refuse_attacks(job.model.history)
    with RunFolder.open(out, manifest(job), resume, LEGAL) as folder, folder.session(ended=TRAINED) as session:
        return _train(job, folder, session, report)


def _train(job: Job, folder: RunFolder | None, session: Session | None, report: Watch) -> FinetuneResult:
    optimiser = make_optimiser(job.settings, job.steps)
    trained, state, frozen, moved = start(job.model, job.settings, optimiser)
    stand = _restored(folder, {"trained": trained, "state": state, "best": trained}) or _Stand((0, trained, state))
    out = None if folder is None else folder.path
    step = make_step(job.model.config, job.settings, optimiser, job.model.mesh, moved)
    feed = Feed(job)
    heldout_loss = _heldout_loss(job, feed.heldout(), frozen)
    rates = learning_rates(job.settings, job.steps)
    if stand.point[0]:
        report(stand.point[0], 0, RESUMED)
    try:
        for number in range(stand.point[0], job.steps):
            if stand.progress["stopped"]:
                break
            with signals.delayed():  # a step that has begun is finished, so that it can be kept
                *after, found = step(*stand.point[1:], frozen, feed.batch(number))
                stand.point = (number + 1, *after)
                loss, norm = float(found["loss"]), float(found["norm"])
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise UserError(f"The loss of step {number + 1} is {loss}, its gradient's norm {norm}. Lower the learning rate.")
                last = number + 1 == job.steps
                held = heldout_loss(stand, last) if last or (number + 1) % job.evaluate_every == 0 else math.nan
                epoch, tokens = (number + 1) / job.steps_per_epoch, scored_tokens(job.examples, job.order[number])
                row = (number + 1, epoch, loss, held, norm, float(np.asarray(rates(number))), tokens)
                stand.progress["rows"].append(dict(zip(COLUMNS, row, strict=True)))
                report(1, sum(len(job.examples[i].ids) for i in job.order[number]), f"loss {loss:.3f}")
                if out is not None and (last or stand.progress["stopped"] or (number + 1) % job.save_every == 0):
                    _save(out, stand)
            signals.check() if session is None else session.count(steps=1, scored_tokens=tokens)
    except KeyboardInterrupt:
        if out is not None and stand.point[0] == len(stand.progress["rows"]) > 0 and not _is_donated(stand.point):
            _save(out, stand)
        raise
    rows, stopped = stand.progress["rows"], stand.progress["stopped"]
    chosen, at = (stand.best, stand.progress["best_step"]) if stand.best is not None else (stand.point[1], len(rows))
    return _tuned(job, chosen, rows, at, stopped)


def _restored(folder: RunFolder | None, like: dict[str, Any]) -> _Stand | None:
    """Where a continued run stands; None at its beginning."""
    if folder is None or not folder.continues:
        return None
    checkpoint.clean(folder.path)
    held = checkpoint.found(folder.path)
    if not held:
        return None
    arrays, progress = checkpoint.restore(held[-1], like)
    return _Stand((len(progress["rows"]), arrays["trained"], arrays["state"]), arrays.get("best"), progress)


def _is_donated(point: tuple[int, Any, Any]) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(point[1:]))


def _heldout_loss(job: Job, batches: list[Batch], frozen: Any) -> Callable[[_Stand, bool], float]:
    """Measures the held-out loss of where a run stands (NaN without held-out examples), and notes bests and why a run stops early."""
    evaluate = make_evaluation(job.model.config, job.settings)

    def measure(stand: _Stand, last: bool) -> float:
        if not batches:
            return math.nan
        trained, progress, patience = stand.point[1], stand.progress, job.settings.patience
        held = sum(float(evaluate(trained, frozen, batch)) for batch in batches) / scored_tokens(job.heldout, range(len(job.heldout)))
        if progress["best"] is None or held < progress["best"]:
            progress |= {"best": held, "best_step": stand.point[0], "since": 0}
            stand.best = jax.tree.map(jnp.copy, trained) if patience else None
        else:
            progress["since"] += 1
            if patience and progress["since"] >= patience and not last:
                progress["stopped"] = f"no better held-out loss {patience} times in a row"
        if job.until and held <= job.until and not last:
            progress["stopped"] = f"held-out loss {held:.4f}, which is no more than {job.until:.4f}"
        return held

    return measure


def _save(out: Path, stand: _Stand) -> None:
    step, trained, state = stand.point
    arrays = {"trained": trained, "state": state, **({"best": stand.best} if stand.best is not None else {})}
    checkpoint.save(out, step, arrays, {**stand.progress, "arrays": sorted(arrays)})
    write_losses(out, stand.progress["rows"])


def _tuned(job: Job, trained: Any, rows: list[dict[str, float]], step: int, stopped: str) -> FinetuneResult:
    model, settings = job.model, job.settings
    if settings.method == "lora":
        trained = {module: {"A": pair["A"], "B": settings.strength * pair["B"]} for module, pair in trained.items()}
        added = jax.jit(lambda factors: lay_out(model.config, settings.lora, factors))(trained)
        params = merge(model.config, model.params, added)
    else:
        params = jax.tree.map_with_path(lambda path, leaf: leaf.astype(param_dtype(model.config, path[-1].key)), trained)
    edit = {"kind": "fine-tuning", "method": settings.method, "steps": step, "examples": len(job.examples), "data": job.data}
    edit |= {"settings": dataclasses.asdict(settings)} | ({"until": job.until} if job.until else {})
    new = replace(model, params=params, history=(*model.history, edit)).describe_params()
    return FinetuneResult(new, rows, settings, trained if settings.method == "lora" else None, step, stopped, model)


def finish(tuned: FinetuneResult, out: Path, save: Sequence[str]) -> list[str]:
    """Writes what a run leaves: losses, run.json, and of "adapter" and "model" what is asked for. Returns lines that say what."""
    said = []
    with hold(out):
        write_losses(out, tuned.losses)
        if "adapter" in save and tuned.factors is not None and not (out / "adapter").exists():
            said.append(f"adapter (PEFT): {tuned.save_adapter(out / 'adapter')}")
        if "model" in save and not (out / "model").exists():
            said.append(f"model (Hugging Face): {export_folder(tuned.model, out / 'model')}")
        folder = RunFolder(out, read_run(out), True)
        found = {"stopped": tuned.stopped, "steps": len(tuned.losses), "parameters_of_step": tuned.step}
        folder.note(status="finished", seconds=round(seconds_spent(folder.record), 3), **found)
    return said


def finetune(
    model: Model,
    examples: Sequence[Example],
    heldout: Sequence[Example] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tunes a loaded model in memory and returns the result, with which any other call goes on.

    Args:
        examples: prompts with responses, as `read_examples` gives them; the loss is taken on the responses alone.
        heldout: examples for the held-out loss, never trained on.
        out: folder for losses and checkpoints; None: nothing is written.
        resume: go on with what `out` holds.
        settings: fields of `finetuning.settings.Settings`.

    Raises:
        UserError: unknown or impossible settings; no examples, or some that do not tokenise; see also `run`.
    """
    job = make_job(model, examples, heldout, make_settings(**settings))
    tuned = run_job(job, None if out is None else Path(out), resume)
    if out is not None:
        finish(tuned, Path(out), ())
    return tuned
