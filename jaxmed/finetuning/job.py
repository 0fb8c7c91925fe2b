"""A checked fine-tuning run: what is trained on what in which order and shapes, and what it costs."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmed.axes import row_parts
from jaxmed.batching.batches import (
    Batch,
    Place,
    Shape,
    choose_shape,
    common_beginning,
    count_steps,
    epochs,
    make_batch,
    microbatches,
    places,
    scored_tokens,
    stack,
)
from jaxmed.errors import UserError
from jaxmed.finetuning.lora import adapted_rules, factor_shapes
from jaxmed.finetuning.settings import Settings
from jaxmed.models.model import Model
from jaxmed.models.params import param_shapes
from jaxmed.prompts.examples import Example
from jaxmed.runs.cost import Cost
from jaxmed.tokens import DATE, TokenizedExample, check_tokens, encode_example, tell_seams


@dataclass(frozen=True)
class Job:
    """A checked fine-tuning run: everything that is known before the first step.

    Attributes:
        examples, heldout: encoded; `heldout` is never trained on.
        order: example numbers of every optimiser step.
        shape, heldout_shape: of the batches.
        data: SHA-256 of the token ids.
        until: held-out loss, in nats, at which the run stops, whatever steps are left; 0: none.
    """

    model: Model
    settings: Settings
    examples: tuple[TokenizedExample, ...]
    heldout: tuple[TokenizedExample, ...]
    order: tuple[np.ndarray, ...]
    shape: Shape
    heldout_shape: Shape | None
    data: str
    until: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.order)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.settings.batch)

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

    def places(self, step: int) -> Iterator[tuple[int, Place]]:
        """(microbatch, place) of every example of a step."""
        for part, group in enumerate(microbatches(self.order[step], self.settings.accumulate)):
            yield from ((part, place) for place in places(self.examples, group, self.shape, self.settings.packing))

    @property
    def keeps(self) -> bool:
        """Whether what the blocks without adapters give is kept from one epoch to the next."""
        again = self.settings.first_layer and self.steps > self.steps_per_epoch
        return bool(again) and kept_bytes(self) <= MOST_KEPT

    def heldout_batches(self) -> list[Batch]:
        """The held-out examples, in their order."""
        if self.heldout_shape is None:
            return []
        groups = _groups(len(self.heldout), self.settings.batch)
        return [make_batch(self.heldout, group, self.heldout_shape, self.settings.packing) for group in groups]


MOST_STEPS = 10**7
"""Of a run: the order of all its data is drawn at the beginning."""
MOST_KEPT = 8e9
"""Bytes of residual stream that are kept on the host."""


def kept_bytes(job: Job) -> int:
    """Bytes of the residual stream of all examples."""
    return 4 * job.model.config.width * sum(len(example.ids) for example in job.examples)


def _groups(total: int, size: int) -> list[np.ndarray]:
    return [np.arange(at, min(at + size, total)) for at in range(0, total, size)]


def make_job(model: Model, examples: Sequence[Example], heldout: Sequence[Example] = (), settings: Settings | None = None) -> Job:
    """Everything that can be refused before a run, in one place; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: settings that cannot be used; no examples; examples that do not tokenise.
    """
    settings = settings or Settings()
    config = model.config
    settings.check(config.max_length)
    if settings.method == "lora":
        adapted_rules(config, settings.lora)
    elif config.int8:
        raise UserError("A model kept as int8 is fine-tuned by --method lora only.")
    if not examples:
        raise UserError("There are no examples to train on.")
    encode = partial(encode_example, model.tokenizer, form=settings.form, most=settings.max_length or config.max_length)
    encoded, held = (
        tuple(encode(one, most_response=most or None) for one, most in zip(part, response_limits(len(part), settings), strict=True))
        for part in (examples, heldout)
    )
    tell_seams([*encoded, *held])
    check_tokens(config, (one.ids for one in (*encoded, *held)), "An example", model.tokenizer)
    steps = settings.steps or count_steps(len(encoded), settings.batch, settings.epochs)
    if steps > MOST_STEPS:
        raise UserError(f"Settings of fine-tuning: {steps:,} steps; at most {MOST_STEPS:,}. Give fewer steps or epochs, or a larger batch.")
    order = epochs([len(one.ids) for one in encoded], settings.batch, steps, settings.seed)
    devices = row_parts(model.mesh)
    trunk = common_beginning([*encoded, *held]) if settings.packing else 0
    parts = [part for group in order for part in microbatches(group, settings.accumulate) if len(part)]
    shape = choose_shape(encoded, parts, settings.packing, devices, config, trunk)
    groups = _groups(len(held), settings.batch)
    heldout_shape = choose_shape(held, groups, settings.packing, devices, config, trunk) if held else None
    digest = hashlib.sha256()
    for one in (*encoded, *held):
        digest.update(one.ids.tobytes() + one.prompt.to_bytes(4, "little"))
    return Job(model, settings, encoded, held, tuple(order), shape, heldout_shape, digest.hexdigest())


def response_limits(count: int, settings: Settings) -> list[int]:
    """Limit of every example's response tokens, 0 where it keeps them all.

    Drawn apart from the order of the data, which begins with the same seed's first permutation.
    """
    limit = np.full(count, settings.max_response)
    limit[np.random.default_rng([settings.seed, 1]).permutation(count)[: round(settings.whole_share * count)]] = 0
    return limit.tolist()


def manifest(job: Job) -> dict[str, Any]:
    """What makes two runs the same run: a run goes on only where all of it agrees."""
    settings = dataclasses.asdict(job.settings)
    day = DATE.date().isoformat()
    found = {"model": job.model.record, "data": job.data, "settings": settings, "mesh": dict(job.model.mesh.shape), "template_date": day}
    return found | ({"until": job.until} if job.until else {})


def trained_numbers(job: Job) -> int:
    """How many numbers are trained."""
    config = job.model.config
    trained = factor_shapes(config, job.settings.lora) if job.settings.method == "lora" else param_shapes(config)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))


def step_flops(job: Job) -> float:
    """Matmul FLOPs of one optimiser step: forward, gradient of the activations, and (full) gradient of the weights; padding included,
    the blocks below the first adapted one not."""
    layers, lora = job.model.config.layers - job.settings.first_layer, job.settings.method == "lora"
    weights, attention = _forward_flops(job)
    unembedding = job.shape.rows * job.shape.scored * 2.0 * job.model.config.vocabulary * job.model.config.width
    times = (2 if lora else 3) + job.settings.remat
    return job.settings.accumulate * ((layers * weights + unembedding) * times + layers * attention * 3)


def _forward_flops(job: Job) -> tuple[float, float]:
    """FLOPs of one block on one microbatch: by its weights, and of attention."""
    config, shape = job.model.config, job.shape
    seen = shape.trunk * shape.trunk + (shape.length - shape.trunk) * (shape.trunk + shape.branch)
    tokens = shape.rows * shape.length
    return tokens * 2.0 * config.layer_weights, shape.rows * seen * 4.0 * config.heads * config.head_width


def total_flops(job: Job) -> float:
    """Matmul FLOPs of a run, without held-out losses."""
    below = job.settings.accumulate * job.settings.first_layer * sum(_forward_flops(job))
    return job.steps * step_flops(job) + below * (job.steps_per_epoch if job.keeps else job.steps)


def plan_lines(job: Job, rate: float | None = None) -> list[str]:
    """The cost of a run, in words; with `rate` in FLOP/s, the time too."""
    settings, shape = job.settings, job.shape
    tokens = sum(len(example.ids) for example in job.examples)
    scored = scored_tokens(job.examples, range(len(job.examples)))
    used = sum(len(job.examples[i].ids) - shape.trunk for group in job.order for i in group)
    filled = used / (job.steps * settings.accumulate * shape.rows * shape.branches * shape.branch)
    trained = trained_numbers(job)
    lines = [
        f"{len(job.examples)} examples, {tokens:,} tokens, {scored:,} of them scored; {len(job.heldout)} held out for the loss",
        f"{job.steps} steps of {settings.batch} examples: {settings.accumulate} x {shape.rows} rows of {shape.branches} x {shape.branch} "
        f"tokens, {filled:.0%} filled, behind {shape.trunk} that all examples begin with",
        f"{trained:,} numbers trained ({settings.method}); optimiser state {8 * trained / 1e6:,.1f} MB in all",
        Cost("training", flops=total_flops(job)).line(rate),
    ]
    if settings.first_layer:
        kept = f"run once per example; {kept_bytes(job) / 1e6:,.0f} MB are kept" if job.keeps else "run in every step, forward alone"
        lines.append(f"layers 0 to {settings.first_layer - 1} have no adapters: {kept}")
    if job.cut:
        lines.append(f"{job.cut} responses are longer than the limit of tokens and lose their end")
    return lines
