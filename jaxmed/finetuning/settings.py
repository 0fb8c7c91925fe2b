"""What is fine-tuned on what, and how: the one place for every setting, its default and its meaning. No JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.prompts.examples import HELDOUT, Example, read_examples
from jaxmed.prompts.forms import FormName

METHODS = ("lora", "full")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Lora:
    """What is adapted, and how: W + scale * B @ A.

    Attributes:
        rank, alpha: scale = alpha / rank.
        targets: last parts of module names, such as "q_proj"; empty: every matrix of the blocks.
        stabilised: whether the scale is alpha / sqrt(rank).
        first_layer: the lowest block that is adapted.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    stabilised: bool = False
    first_layer: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned."""

    method: Literal["lora", "full"] = "lora"
    """Adapters on the blocks' matrices, or every parameter."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    stabilised: bool = False
    """Scale the adapters by alpha / sqrt(rank) instead (rsLoRA)."""
    strength: float = 1.0
    """Factor that the trained adapters are multiplied by before they are merged; 1: as trained."""
    targets: tuple[str, ...] = ()
    """Adapted matrices by the last part of their names, such as q_proj v_proj; empty: all of the blocks."""
    first_layer: int = 0
    """The lowest block with adapters; the blocks below it are run once per example, not in every epoch."""
    learning_rate: float = 2e-4
    """Highest learning rate, reached after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or down to zero at the last step (linear, cosine)."""
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
    """Weight decay of AdamW, on matrices alone."""
    beta1: float = 0.9
    """Decay rate of AdamW's mean of the gradients."""
    beta2: float = 0.999
    """Decay rate of AdamW's mean of the squared gradients."""
    epsilon: float = 1e-8
    """Number that AdamW adds to the root of the mean square, against division by zero."""
    packing: bool = True
    """Several examples may share a row of tokens, without seeing each other."""
    form: FormName = "chat"
    """How prompt and response are joined: the chat template, or plain (prompt, newline, response), space, qa, text."""
    max_length: int = 0
    """Tokens of an example at most; a longer one loses its end. 0: as many as the model takes."""
    max_response: int = 0
    """Tokens of a response at most, such as 12 to train how answers begin; 0: no limit."""
    whole_share: float = 0.0
    """Fraction of the examples (chosen by --seed) that is trained on whole responses instead of their first --max-response tokens."""
    remat: bool = False
    """Run blocks again for their gradients, which saves memory."""
    evaluate_every: int = 0
    """Steps between held-out losses; 0: a tenth of the steps."""
    patience: int = 0
    """Stop after so many held-out losses without a new best, and keep the best; 0: never."""
    save_every: int = 0
    """Steps between checkpoints; 0: a fifth of the steps."""
    seed: int = 0
    """Seed of the order of the data, the held-out share and fresh adapters."""

    @property
    def lora(self) -> Lora:
        return Lora(self.rank, self.alpha, tuple(self.targets), self.stabilised, self.first_layer)

    def check(self, longest: int) -> None:
        """Raises a UserError that lists all values that cannot be used; `longest` is how many tokens the model takes."""
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        positive = ("learning_rate", "epochs", "batch", "accumulate", "epsilon", "strength")
        wrong = [f"{name} is {getattr(self, name)}; it is above 0" for name in positive if not getattr(self, name) > 0]
        others = ("warmup", "steps", "clip", "weight_decay", "max_length", "max_response", "evaluate_every", "patience", "save_every")
        wrong += [f"{name} is {getattr(self, name)}; it is not negative" for name in others if not getattr(self, name) >= 0]
        shares = [name for name in ("beta1", "beta2", "whole_share") if not 0 <= getattr(self, name) < 1]
        wrong += [f"{name} is {getattr(self, name)}; it is from 0 to below 1" for name in shares]
        if self.whole_share and not self.max_response:
            wrong.append("whole_share is of responses that a max_response cuts")
        if self.method == "full" and self.strength != 1:
            wrong.append("strength is of adapters (--method lora)")
        if self.method == "full" and self.first_layer:
            wrong.append("first_layer is of adapters (--method lora)")
        if self.accumulate > self.batch:
            wrong.append(f"accumulate is {self.accumulate}, more than the batch of {self.batch} examples")
        if self.max_length > longest:
            wrong.append(f"max_length is {self.max_length}; this model takes {longest} tokens")
        if wrong:
            raise UserError("Settings of fine-tuning: " + "; ".join(wrong) + ".")


@dataclass(frozen=True)
class Source:
    """What is fine-tuned on what."""

    data: str = "alignment"
    """Examples file (.jsonl, .csv, .parquet; prompt, response, ...), or a bundled set: alignment. Rows of split heldout are left out."""
    model: str = ""
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    heldout: str = ""
    """Examples file of the held-out loss; empty: a part of --data, see --heldout-share."""
    heldout_share: float = 0.1
    """Fraction of --data that is held out where --heldout names no file."""


@dataclass(frozen=True)
class Recipe(Settings, Source):
    """A fine-tuning run by name: what the entries of a config of `jaxmed finetune` say, whatever writes its results."""

    def examples(self) -> tuple[list[Example], list[Example]]:
        """The examples to train on, and those of the held-out loss."""
        if not 0 <= self.heldout_share < 1:
            raise UserError(f"The held-out share is from 0 to below 1, not {self.heldout_share}.")
        rows = [row for row in read_examples(self.data) if row.split != HELDOUT]
        if not rows:
            raise UserError(f"{self.data} holds no rows to train on: all have the split {HELDOUT!r}.")
        if self.heldout:
            return rows, read_examples(self.heldout)
        count = round(self.heldout_share * len(rows))
        if count == len(rows):
            raise UserError(f"{self.data} has {len(rows)} rows to train on; a held-out share of {self.heldout_share} leaves none.")
        held = set(np.random.default_rng(self.seed).permutation(len(rows))[:count].tolist())
        return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]

    @property
    def settings(self) -> Settings:
        return Settings(**{f.name: getattr(self, f.name) for f in fields(Settings)})


def make_settings(**given: Any) -> Settings:
    """Settings from keyword arguments.

    Raises:
        UserError: an unknown one.
    """
    legal = [f.name for f in fields(Settings)]
    for name in given:
        if name not in legal:
            raise unknown("setting", name, legal)
    return Settings(**given)


def read_recipe(entries: Mapping[str, Any]) -> Recipe:
    """The recipe of a config file's entries; those that say where results go are left out."""
    given = {key.replace("-", "_"): value for key, value in entries.items()}
    return Recipe(**{f.name: given[f.name] for f in fields(Recipe) if f.name in given})
