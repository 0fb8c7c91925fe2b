"""A scoring run before it runs: everything that can be refused, and what makes two runs the same run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxmed.batching.texts import encode
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.models.named_weights import inputs_axis, matrix_shapes
from jaxmed.prompts.examples import Example
from jaxmed.pruning.plan import Plan, make_plan
from jaxmed.tokens import TokenizedExample, check_tokens

SETS = ("behaviour", "preserve")
KINDS = ("signed", "absolute", "inputs")
USUAL = ("behaviour_signed", "preserve_absolute")


@dataclass(frozen=True)
class Job:
    """A checked scoring run.

    Attributes:
        sets: set -> its examples as tokens, those only that a kind needs.
        plans: set -> how it is cut into passes and batches.
        how: the settings, for the record.
        cut: whether the user said how many layers a pass has.
    """

    model: Model
    kinds: tuple[str, ...]
    sets: Mapping[str, list[TokenizedExample]]
    plans: Mapping[str, Plan]
    how: Mapping[str, Any]
    cut: bool = False

    def begun(self, spans: Mapping[str, Any]) -> Job:
        """The job with the passes of a run that was begun, maybe with another memory, unless the user asks for others.

        Args:
            spans: set -> [first layer, layer after the last] of every pass, as `record` has them.
        """
        if self.cut:
            return self
        return replace(self, plans={which: plan.with_spans(spans.get(which, plan.spans)) for which, plan in self.plans.items()})

    @property
    def batches(self) -> int:
        return sum(plan.batches * len(plan.spans) for plan in self.plans.values())

    def bytes_of(self, which: str) -> int:
        """Bytes that the scores of a set take on the disk; those of inputs, a vector per matrix, are not counted."""
        numbers = sum(math.prod(shape) for shape in matrix_shapes(self.model.config).values())
        return 4 * numbers * sum(kind != "inputs" for kind in self.kinds_of(which))

    def kinds_of(self, which: str) -> tuple[str, ...]:
        """The sums of a set: "signed", ..."""
        return tuple(kind.split("_")[1] for kind in self.kinds if kind.startswith(which))


def make_job(
    model: Model,
    behaviour: Sequence[Example],
    preserve: Sequence[Example] = (),
    *,
    kinds: Sequence[str] = USUAL,
    form: str = "plain",
    scored_separator: bool = False,
    max_length: int = 0,
    rows: int = 0,
    layers_per_pass: int = 0,
    remat: bool | None = None,
) -> Job:
    """Everything that can be refused before a run; needs the tokenizer and the config, not the weights."""
    legal = [f"{which}_{kind}" for which in SETS for kind in KINDS]
    for kind in kinds:
        if kind not in legal:
            raise UserError(f"There is no kind of score {kind!r}. Legal: {', '.join(legal)}.")
    if model.config.int8:
        raise UserError("A model kept as int8 has no gradients of its weights. Load it without int8.")
    if max_length < 0 or max_length > model.config.max_length:
        raise UserError(f"max_length is {max_length}; this model takes {model.config.max_length} tokens.")
    given = {"behaviour": behaviour, "preserve": preserve}
    sets = {}
    for which in SETS:
        if any(kind.startswith(which) for kind in kinds):
            if not given[which]:
                raise UserError(f"The {which} set is empty; {', '.join(kind for kind in kinds if kind.startswith(which))} needs it.")
            missing = [number for number, one in enumerate(given[which], 1) if not one.response.strip()]
            if missing:
                raise UserError(f"Example {missing[0]} of the {which} set has no response ({len(missing)} have none).")
            sets[which] = encode(model.tokenizer, given[which], form, scored_separator, max_length or model.config.max_length)
            check_tokens(model.config, (one.ids for one in sets[which]), f"The {which} set", model.tokenizer)
    how = {"form": form, "scored_separator": scored_separator, "max_length": max_length}
    job = Job(model, tuple(kinds), sets, {}, how)
    plans = {which: make_plan(model, found, job.kinds_of(which), rows, layers_per_pass, remat) for which, found in sets.items()}
    return Job(model, tuple(kinds), sets, plans, how, bool(layers_per_pass))


def token_digest(examples: Sequence[TokenizedExample]) -> str:
    """SHA-256 of the tokens of examples."""
    found = hashlib.sha256()
    for one in examples:
        found.update(one.ids.tobytes() + one.prompt.to_bytes(4, "little"))
    return found.hexdigest()


def record(job: Job) -> dict[str, Any]:
    """What makes two scoring runs the same run."""
    config = job.model.config
    return {
        "model": job.model.record,
        "sets": {which: {"examples": len(found), "tokens_sha256": token_digest(found)} for which, found in job.sets.items()},
        "kinds": list(job.kinds),
        "how": dict(job.how),
        "spans": {which: [list(span) for span in plan.spans] for which, plan in job.plans.items()},
        "shapes": {name: list(shape) for name, shape in matrix_shapes(config).items()},
        "inputs_axis": inputs_axis(config),
    }
