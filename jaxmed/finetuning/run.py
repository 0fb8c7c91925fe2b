"""Fine-tuning from examples to a model: checked, planned, run step by step, resumable to the bit."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed import results
from jaxmed.axes import replicated
from jaxmed.errors import UserError
from jaxmed.finetuning import checkpoint
from jaxmed.finetuning.batches import (
    Batch,
    Shape,
    choose_shape,
    count_steps,
    epochs,
    make_batch,
    microbatches,
    scored_tokens,
    stack,
)
from jaxmed.finetuning.lora import Factors, count, lay_out, merge, new_factors, save_adapter
from jaxmed.finetuning.train import Settings, learning_rates, make_evaluation, make_optimiser, make_step, split_params
from jaxmed.models.load import Model
from jaxmed.models.transformer import param_dtype
from jaxmed.prompts.examples import Example
from jaxmed.provenance import versions
from jaxmed.tokens import Answered, encode_example

LOSSES, CURVE = "losses.csv", "losses.html"
ATTENTION_COST = 4.0
"""Time of attention's FLOPs against those of the weights' matmuls, softmax included; it decides how long rows are packed."""
COLUMNS = ("step", "epoch", "loss", "heldout_loss", "gradient_norm", "learning_rate", "scored_tokens")
Report = Callable[[float, int, str], None]
"""Called with (steps done, tokens done, what is being done)."""


@dataclass(frozen=True)
class Job:
    """A checked fine-tuning run: everything that is known before the first step.

    Attributes:
        examples, heldout: encoded; `heldout` is never trained on.
        order: example numbers of every optimiser step.
        shape, heldout_shape: of the batches.
        data: SHA-256 of the token ids.
    """

    model: Model
    settings: Settings
    examples: tuple[Answered, ...]
    heldout: tuple[Answered, ...]
    order: tuple[np.ndarray, ...]
    shape: Shape
    heldout_shape: Shape | None
    data: str

    @property
    def steps(self) -> int:
        return len(self.order)

    @property
    def evaluate_every(self) -> int:
        return self.settings.evaluate_every or max(1, self.steps // 10)

    @property
    def save_every(self) -> int:
        return self.settings.save_every or max(1, self.steps // 5)

    @property
    def cut(self) -> int:
        """Examples whose response lost tokens to the limit."""
        return sum(example.cut > 0 for example in (*self.examples, *self.heldout))

    def batch(self, step: int) -> Batch:
        """The batches [A, ...] of a step, on the host."""
        parts = microbatches(self.order[step], self.settings.accumulate)
        return stack([make_batch(self.examples, part, self.shape, self.settings.packing) for part in parts])

    def heldout_batches(self) -> list[Batch]:
        """The held-out examples, in their order."""
        if self.heldout_shape is None:
            return []
        groups = _groups(len(self.heldout), self.settings.batch)
        return [make_batch(self.heldout, group, self.heldout_shape, self.settings.packing) for group in groups]


def _groups(total: int, size: int) -> list[np.ndarray]:
    return [np.arange(at, min(at + size, total)) for at in range(0, total, size)]


def check(model: Model, examples: Sequence[Example], heldout: Sequence[Example] = (), settings: Settings | None = None) -> Job:
    """Everything that can be refused before a run, in one place; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: settings that cannot be used; no examples; examples that do not tokenise.
    """
    settings = settings or Settings()
    config = model.config
    settings.check(config)
    if not examples:
        raise UserError("There are no examples to train on.")
    most = settings.max_length or config.max_length
    encoded, held = (tuple(encode_example(model.tokenizer, one, settings.plain, most) for one in part) for part in (examples, heldout))
    steps = settings.steps or count_steps(len(encoded), settings.batch, settings.epochs)
    order = epochs(len(encoded), settings.batch, steps, settings.seed)
    devices = model.mesh.shape["data"]
    per_key = ATTENTION_COST * 4 * config.heads * config.head_width / (2 * config.layer_weights)
    parts = [part for group in order for part in microbatches(group, settings.accumulate) if len(part)]
    shape = choose_shape(encoded, parts, settings.packing, devices, per_key)
    groups = _groups(len(held), settings.batch)
    heldout_shape = choose_shape(held, groups, settings.packing, devices, per_key) if held else None
    digest = hashlib.sha256()
    for one in (*encoded, *held):
        digest.update(one.ids.tobytes() + one.prompt.to_bytes(4, "little"))
    return Job(model, settings, encoded, held, tuple(order), shape, heldout_shape, digest.hexdigest())


def manifest(job: Job) -> dict[str, Any]:
    """What makes two runs the same run: a run goes on only where all of it agrees."""
    settings = dataclasses.asdict(job.settings)
    model = {"name": job.model.name, "revision": job.model.revision, "weights": job.model.weights_hash, "dtype": job.model.config.dtype}
    return {"model": model, "data": job.data, "settings": settings, "mesh": dict(job.model.mesh.shape)}


def trained_numbers(job: Job) -> int:
    """How many numbers are trained."""
    if job.settings.method == "lora":
        return count(new_factors(job.model.config, job.settings.lora, 0))
    config = job.model.config
    return config.layers * config.layer_weights + config.vocabulary * config.width * (1 if config.tied else 2)


def step_flops(job: Job) -> float:
    """Matmul FLOPs of one optimiser step: forward, gradient of the activations, and (full) gradient of the weights; padding included."""
    config, shape = job.model.config, job.shape
    tokens = shape.rows * shape.length
    weights = tokens * config.layers * 2.0 * config.layer_weights + shape.rows * shape.scored * 2.0 * config.vocabulary * config.width
    attention = tokens * config.layers * 4.0 * config.heads * config.head_width * shape.length
    full = job.settings.method == "full"
    return job.settings.accumulate * (weights * ((3 if full else 2) + job.settings.remat) + attention * 3)


def plan_lines(job: Job, seconds: float | None = None) -> list[str]:
    """The cost of a run, in words."""
    from jaxmed.plan import show_time

    settings, shape = job.settings, job.shape
    tokens = sum(len(example.ids) for example in job.examples)
    scored = scored_tokens(job.examples, np.arange(len(job.examples)))
    used = sum(len(job.examples[i].ids) for group in job.order for i in group)
    filled = used / (job.steps * settings.accumulate * shape.rows * shape.length)
    trained = trained_numbers(job)
    lines = [
        f"{len(job.examples)} examples, {tokens:,} tokens, {scored:,} of them scored; {len(job.heldout)} held out for the loss",
        f"{job.steps} steps of {settings.batch} examples: {settings.accumulate} x {shape.rows} rows of {shape.length} tokens, "
        f"{filled:.0%} filled",
        f"{trained:,} numbers trained ({settings.method}); optimiser state {8 * trained / 1e6:,.1f} MB in all",
        f"{job.steps * step_flops(job) / 1e12:.1f} TFLOP of matmuls" + (f", about {show_time(seconds)}" if seconds else ""),
    ]
    if job.cut:
        lines.append(f"{job.cut} responses are longer than the limit of tokens and lose their end")
    return lines


@dataclass
class Tuned:
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


def _silent(*_: Any) -> None:
    return None


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


def run(job: Job, out: Path | None = None, resume: bool = False, report: Report = _silent) -> Tuned:
    """Runs a job. With `out`, where it stands is kept there, and an interrupted run goes on with `resume`, equal to the bit.

    Raises:
        UserError: `out` holds something else, a run without `resume`, or a run of other settings, data or weights; a full disk; a
            loss that is not finite.
    """
    model, settings = job.model, job.settings
    optimiser = make_optimiser(settings, job.steps)
    stand, frozen, moved = _begin(job, optimiser, out, resume)
    step = make_step(model.config, settings, optimiser, moved)
    heldout_loss = _heldout_loss(job, frozen)
    rates = learning_rates(settings, job.steps)
    placed = jax.NamedSharding(model.mesh, jax.P(None, "data"))
    if stand.point[0]:
        report(stand.point[0], 0, "resumed")
    try:
        for number in range(stand.point[0], job.steps):
            if stand.progress["stopped"]:
                break
            batch = jax.device_put(job.batch(number), placed)
            *after, found = step(*stand.point[1:], frozen, batch)
            stand.point = (number + 1, *after)
            loss, norm = float(found["loss"]), float(found["norm"])
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise UserError(f"The loss of step {number + 1} is {loss}, its gradient's norm {norm}. Lower the learning rate.")
            last = number + 1 == job.steps
            held = heldout_loss(stand, last) if last or (number + 1) % job.evaluate_every == 0 else math.nan
            epoch, tokens = (number + 1) * settings.batch / len(job.examples), scored_tokens(job.examples, job.order[number])
            row = (number + 1, epoch, loss, held, norm, float(np.asarray(rates(number))), tokens)
            stand.progress["rows"].append(dict(zip(COLUMNS, row, strict=True)))
            report(1, sum(len(job.examples[i].ids) for i in job.order[number]), f"loss {loss:.3f}")
            if out is not None and (last or stand.progress["stopped"] or (number + 1) % job.save_every == 0):
                _save(out, stand)
    except KeyboardInterrupt:
        if out is not None and stand.point[0] == len(stand.progress["rows"]) > 0 and not _is_donated(stand.point):
            _save(out, stand)
        raise
    rows, stopped = stand.progress["rows"], stand.progress["stopped"]
    chosen, at = (stand.best, stand.progress["best_step"]) if stand.best is not None else (stand.point[1], len(rows))
    return _tuned(job, chosen, frozen, rows, at, stopped)


def _is_donated(point: tuple[int, Any, Any]) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(point[1:]))


def _begin(job: Job, optimiser: Any, out: Path | None, resume: bool) -> tuple[_Stand, Any, Any]:
    """Where the run stands, what is frozen, and the shardings of the optimiser's moments where they differ from the parameters'."""
    model, settings = job.model, job.settings
    whole = replicated(model.mesh)
    factors = jax.device_put(new_factors(model.config, settings.lora, settings.seed), whole) if settings.method == "lora" else {}
    trained, frozen = split_params(settings, model.params, factors)
    home = jax.tree.map(lambda leaf: leaf.sharding, trained)
    spread = _spread(trained, model.mesh) if settings.method == "full" and model.mesh.shape["data"] > 1 else None
    state = jax.jit(optimiser.init, out_shardings=_state_shardings(optimiser, trained, spread or home, whole))(trained)
    stand = _Stand((0, trained, state))
    restored = None if out is None else _open(job, out, resume, {"trained": trained, "state": state, "best": trained})
    if restored is not None:
        arrays, progress = restored
        stand = _Stand((len(progress["rows"]), arrays["trained"], arrays["state"]), arrays.get("best"), progress)
    return stand, frozen, (spread, home) if spread else None


def _heldout_loss(job: Job, frozen: Any) -> Callable[[_Stand, bool], float]:
    """Measures the held-out loss of where a run stands (NaN without held-out examples), and notes bests and the end of patience."""
    evaluate = make_evaluation(job.model.config, job.settings)
    batches = jax.device_put(job.heldout_batches(), jax.NamedSharding(job.model.mesh, jax.P("data")))

    def measure(stand: _Stand, last: bool) -> float:
        if not batches:
            return math.nan
        trained, progress, patience = stand.point[1], stand.progress, job.settings.patience
        held = sum(float(evaluate(trained, frozen, batch)) for batch in batches) / _scored(job.heldout)
        if progress["best"] is None or held < progress["best"]:
            progress |= {"best": held, "best_step": stand.point[0], "since": 0}
            stand.best = jax.tree.map(jnp.copy, trained) if patience else None
        else:
            progress["since"] += 1
            if patience and progress["since"] >= patience and not last:
                progress["stopped"] = f"no better held-out loss {patience} times in a row"
        return held

    return measure


def _scored(examples: Sequence[Answered]) -> int:
    return scored_tokens(examples, np.arange(len(examples)))


def _spread(trained: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings in which every device on "data" holds its own part: the largest axis that is not sharded yet and divides."""

    def one(leaf: jax.Array) -> jax.sharding.NamedSharding:
        spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]  # type: ignore[attr-defined]
        axes = [i for i in range(leaf.ndim) if spec[i] is None and leaf.shape[i] % mesh.shape["data"] == 0]
        if axes:
            spec[max(axes, key=lambda i: leaf.shape[i])] = "data"
        return jax.NamedSharding(mesh, jax.P(*spec))

    return jax.tree.map(one, trained)


def _state_shardings(optimiser: Any, trained: Any, shardings: Any, whole: Any) -> Any:
    """Shardings of the optimiser's state: moments as what they belong to, counters on every device."""
    by_shape = {leaf.shape: sharding for leaf, sharding in zip(jax.tree.leaves(trained), jax.tree.leaves(shardings), strict=True)}
    return jax.tree.map(lambda leaf: by_shape.get(leaf.shape, whole), jax.eval_shape(optimiser.init, trained))


def _open(job: Job, out: Path, resume: bool, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Begins or continues the run in `out`; returns where it stands, or None at its beginning."""
    record = manifest(job)
    if not check_folder(out, resume):
        out.mkdir(parents=True, exist_ok=True)
        begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        results.write_json(out / results.RUN, {"manifest": record, "started": begun, "versions": versions(), "status": "running"})
        return None
    results.check_same(out, results.read_run(out)["manifest"], record)
    checkpoint.clean(out)
    held = checkpoint.found(out)
    return checkpoint.restore(held[-1], like) if held else None


def check_folder(out: Path, resume: bool) -> bool:
    """Whether a run can begin or go on in `out`; returns True if it holds one to go on with.

    Raises:
        UserError: foreign files, or a run and no --resume.
    """
    ours = {results.RUN, results.RUN + ".tmp", LOSSES, LOSSES + ".tmp", CURVE, "adapter", "model"}
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(name for name in held - ours if not name.startswith((checkpoint.BEGINS, "adapter.partial-", "model.partial-")))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder.")
    if foreign:
        raise UserError(f"--out {out} holds something else ({', '.join(foreign[:5])}). Give a new or empty folder; nothing was written.")
    if results.RUN in held and not resume:
        raise UserError(f"--out {out} holds a run already. Add --resume to continue it, or give another folder; nothing was written.")
    return results.RUN in held


def _save(out: Path, stand: _Stand) -> None:
    step, trained, state = stand.point
    arrays = {"trained": trained, "state": state, **({"best": stand.best} if stand.best is not None else {})}
    checkpoint.save(out, step, arrays, {**stand.progress, "arrays": sorted(arrays)})
    write_losses(out, stand.progress["rows"])


def write_losses(out: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes losses.csv, whole or not at all."""
    partial = out / (LOSSES + ".tmp")
    with partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        writer.writerows(["" if row[key] != row[key] else row[key] for key in COLUMNS] for row in rows)
    partial.replace(out / LOSSES)


def _tuned(job: Job, trained: Any, frozen: Any, rows: list[dict[str, float]], step: int, stopped: str) -> Tuned:
    model, settings = job.model, job.settings
    if settings.method == "lora":
        added = jax.jit(lambda factors: lay_out(model.config, settings.lora, factors))(trained)
        params = merge(model.config, frozen, added)
    else:
        params = jax.tree.map_with_path(lambda path, leaf: leaf.astype(param_dtype(model.config, path[-1].key)), trained)
    edit = {"kind": "fine-tuning", "method": settings.method, "steps": step, "examples": len(job.examples), "data": job.data}
    edit |= {"settings": dataclasses.asdict(settings)}
    new = replace(model, params=params, edits=(*model.edits, edit))
    return Tuned(new, rows, settings, trained if settings.method == "lora" else None, step, stopped, model)


def finish(tuned: Tuned, out: Path, save: Sequence[str], seconds: float) -> list[str]:
    """Writes what a run leaves: losses, run.json, and of "adapter" and "model" what is asked for. Returns lines that say what."""
    from jaxmed.models.checkpoints.export import export_folder

    said = []
    write_losses(out, tuned.losses)
    if "adapter" in save and tuned.factors is not None and not (out / "adapter").exists():
        said.append(f"adapter (PEFT): {tuned.save_adapter(out / 'adapter')}")
    if "model" in save and not (out / "model").exists():
        said.append(f"model (Hugging Face): {export_folder(tuned.model, out / 'model')}")
    record = results.read_run(out)
    record |= {"status": "finished", "stopped": tuned.stopped, "steps": len(tuned.losses), "parameters_of_step": tuned.step}
    record["seconds"] = round(record.get("seconds", 0.0) + seconds, 3)
    results.write_json(out / results.RUN, record)
    return said


def finetune(
    model: Model,
    examples: Sequence[Example],
    heldout: Sequence[Example] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> Tuned:
    """Fine-tunes a loaded model in memory and returns the result, with which any other call goes on.

    Args:
        examples: prompts with responses, as `read_examples` gives them; the loss is taken on the responses alone.
        heldout: examples for the held-out loss, never trained on.
        out: folder for losses and checkpoints; None: nothing is written.
        resume: go on with what `out` holds.
        settings: fields of `finetuning.train.Settings`; those of `Lora` (rank, alpha, targets, stabilised) are taken too.

    Raises:
        UserError: unknown or impossible settings; no examples, or some that do not tokenise; see also `run`.
    """
    begun = time.perf_counter()
    job = check(model, examples, heldout, make_settings(**settings))
    tuned = run(job, None if out is None else Path(out), resume)
    if out is not None:
        finish(tuned, Path(out), (), time.perf_counter() - begun)
    return tuned


def make_settings(**given: Any) -> Settings:
    """Settings from keyword arguments, the adapter's among them; a UserError for unknown ones."""
    from jaxmed.errors import unknown
    from jaxmed.finetuning.lora import Lora

    of_lora = {f.name for f in dataclasses.fields(Lora)}
    legal = {f.name for f in dataclasses.fields(Settings)} | of_lora
    for name in given:
        if name not in legal:
            raise unknown("setting", name, legal)
    lora: dict[str, Any] = {key: tuple(value) if key == "targets" else value for key, value in given.items() if key in of_lora}
    return Settings(**{"lora": Lora(**lora), **{key: value for key, value in given.items() if key not in of_lora}})
