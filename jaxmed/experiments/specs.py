"""What dissociation and attacks are about, declared once: the flags of the commands and of the study, with meaning and default. No JAX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmed.prompts.examples import Example, chosen, harmful
from jaxmed.prompts.forms import FormName

if TYPE_CHECKING:
    from jaxmed.experiments.attacks import Attack
    from jaxmed.experiments.dissociation import Abilities


@dataclass(frozen=True, kw_only=True)
class FormSpec:
    """How examples are written."""

    form: FormName = "plain"
    """How prompt and answer are joined. chat: the chat template; text: directly; plain: by a newline; space: by a space; qa: 'Q:, A:'."""


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What the perplexity is measured on."""

    text: str = "neutral"
    """Plain text file for the perplexity, or a bundled one: neutral, neutral-short; empty: no perplexity."""


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """What a model may refuse."""

    requests: str = "alignment"
    """Requests that a model may refuse (rows of kind harmful, where a file has kinds), or a bundled set; empty: none."""
    tokens: int = 24
    """Tokens of an answer to a request at most."""


@dataclass(frozen=True, kw_only=True)
class SparedSpec:
    """How many weights are spared."""

    p: float = 5e-3
    """Fraction of weights that are spared per matrix."""


@dataclass(frozen=True, kw_only=True)
class UtilitySpec:
    """What counts as harmless."""

    utility: float = 0.01
    """Rise of the perplexity, as a fraction, up to which a behaviour counts as halved without harm."""


@dataclass(frozen=True, kw_only=True)
class SeedsSpec:
    """How many random masks stand beside every mask."""

    seeds: int = 1
    """Draws of random masks with the same counts per matrix."""


@dataclass(frozen=True, kw_only=True)
class AbilitySpec(RequestSpec, SeedsSpec):
    """What dissociation asks for."""

    name: str = ""
    """Behaviour as a word in the question; default: the name of its set."""
    twins: str = "polite"
    """Prompts of the behaviour with responses that do not show it, for detection; empty: no detection."""
    explanations: str = "why_rude"
    """Prompts that ask why something shows the behaviour, with responses that say it; empty: none."""
    question: str = ""
    """Question about each row, with {prompt}, {response} and {name}; default: whether this reply is {name}."""

    def make_abilities(self, source: str, rows: dict[str, list[Example]], requests: list[Example], text: str, form: str) -> Abilities:
        """What dissociation measures.

        Args:
            source: the behaviour's set.
            rows: examples of "behaviour", "twins", "explanations" and "preserve".
        """
        from jaxmed.experiments.dissociation import QUESTION, Abilities

        question, name = self.question or QUESTION, self.name or Path(source).stem
        return Abilities(name, **rows, requests=requests, question=question, text=text, tokens=self.tokens, form=form)


@dataclass(frozen=True, kw_only=True)
class AttackSpec(RequestSpec):
    """How models are attacked."""

    refusals: str = "alignment"
    """Requests with refusals, whose weights are removed in memory (rows of kind harmful); empty: no such attack."""
    refusal_examples: int = 128
    """Refusals, and preserved examples, from which the weights of refusal are scored."""
    refusal_q: float = 0.01
    """Fraction of weights that are chosen as those of refusal, by absolute SNIP."""
    refusal_p: float = 0.01
    """Fraction of weights that are spared when those of refusal are chosen."""
    prefill: int = 10
    """Tokens of a response that a pre-filled opening gives."""
    train: str = ""
    """Examples that models are fine-tuned on as an attack: rows for training of a file or bundled set, not those measured; empty: none."""
    train_examples: int | None = None
    """Examples that models are fine-tuned on at most, from the beginning; default: all."""
    train_epochs: float = 5.0
    """Passes of --train over its examples."""
    train_batch: int = 5
    """Examples of --train per optimiser step."""
    train_rate: float = 2e-4
    """Highest learning rate of --train."""
    train_rank: int = 128
    """Rank of the adapters of --train, which are on all matrices of the blocks."""
    train_alpha: float = 16.0
    """Scale of the adapters of --train: their product is multiplied by alpha / rank."""

    def make_attack(self, behaviour: list[Example], requests: list[Example], preserve: str, text: str, form: str) -> Attack:
        """How models are attacked and measured; `preserve` is the set whose weights are spared with those of refusal."""
        from jaxmed.experiments.attacks import TRAINING, Attack
        from jaxmed.pruning.rule import Rule

        how = {"epochs": self.train_epochs, "batch": self.train_batch, "learning_rate": self.train_rate, "form": form}
        return Attack(
            behaviour=behaviour,
            requests=requests,
            refusals=harmful(self.refusals, chosen(self.refusals, "train"))[: self.refusal_examples] if self.refusals else (),
            preserve=chosen(preserve, "train", self.refusal_examples) if self.refusals else (),
            prefill=self.prefill,
            rule=Rule(q=self.refusal_q, p=self.refusal_p, score="absolute"),
            tokens=self.tokens,
            form=form,
            text=text,
            trained=chosen(self.train, "train", self.train_examples) if self.train else (),
            training=replace(TRAINING, rank=self.train_rank, alpha=self.train_alpha, **how),
        )
