"""Contrasts: the two runs that a pair stands for, rendered, aligned and tokenised once.

The base run is the one that is patched, the source run is where values come from. A new kind of contrast is one row of `CONTRASTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxmed.effects.outcomes import Answers, OutcomeName, encode_answers
from jaxmed.errors import UserError, all_problems, notice, quoted
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.tokens import OTHERWISE, PackedPrompt, Patch, align, check_tokens, pack, render


@dataclass(frozen=True)
class Side:
    """One run: a model on a prompt of token ids int [T]; `asked` is the user's last message, for judges."""

    model: Model
    ids: np.ndarray
    asked: str = ""


@dataclass(frozen=True)
class Contrast:
    """A pair as two runs.

    Attributes:
        pair: what it was made of.
        base, source: the run that is patched, and the run that values come from.
        patches: the tokens that are patched together, one for each position that is swept.
        answers: what outcomes read, as token ids.
    """

    pair: PromptPair
    base: Side
    source: Side
    patches: tuple[Patch, ...]
    answers: Answers

    def turned(self) -> Contrast:
        """Base and source change places: the reverse direction, and what natural direct effects need."""
        patches = tuple(replace(patch, base=patch.source, source=patch.base) for patch in self.patches)
        return replace(self, base=self.source, source=self.base, patches=patches)

    def packed(self, side: Side | None = None) -> PackedPrompt:
        """A side's prompt (default: base) with its answers."""
        return pack((side or self.base).ids, self.answers.ids)


def _same_request(pair: PromptPair) -> PromptPair:
    """Both runs read base's message; only the openings of the answer differ."""
    return replace(pair, source=pair.base, messages=None if pair.messages is None else {**pair.messages, "source": pair.messages["base"]})


def _same_prompt(pair: PromptPair) -> PromptPair:
    """Both runs read base's message and opening; only the models differ."""
    return replace(_same_request(pair), source_prefill=pair.base_prefill)


CONTRASTS: dict[str, Callable[[PromptPair], PromptPair]] = {"pair": lambda pair: pair, "prefill": _same_request, "model": _same_prompt}
"""How a pair's two prompts are read: as they stand; one request with two openings; one prompt for two models."""


@dataclass(frozen=True)
class Reading:
    """How pairs become contrasts.

    Attributes:
        contrast: a key of `CONTRASTS`.
        position: which tokens are patched (see `tokens.locate`), or "each".
        form: how prompts are written (see `prompts.forms`).
        outcomes: what is read.
    """

    contrast: str
    position: str | int
    form: str
    outcomes: tuple[OutcomeName, ...]


def make_contrast(model: Model, pair: PromptPair, reading: Reading, source_model: Model | None = None) -> Contrast:
    """One pair, rendered and aligned; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: the sides cannot be aligned; texts that do not tokenise as an outcome needs; tokens that the model does not have.
    """
    read = CONTRASTS[reading.contrast](pair)
    if reading.contrast == "prefill" and pair.base_prefill == pair.source_prefill:
        raise UserError(f"pair {pair.id!r} has no two openings to compare: give base_prefill and source_prefill for --contrast prefill.")
    base, source = (render(model.tokenizer, read, side, reading.form) for side in ("base", "source"))
    patches = tuple(align(base, source, reading.position, pair.spans))
    answers = encode_answers(model.tokenizer, read, reading.outcomes, reading.form)
    more = max(map(len, answers.ids), default=1) - 1
    for used in {id(one): one for one in (model, source_model or model)}.values():
        check_tokens(used.config, (base.ids, source.ids), "the prompt", used.tokenizer, more)
        check_tokens(used.config, answers.ids, "an answer", used.tokenizer)
    sides = Side(model, base.ids, read.asked("base")), Side(source_model or model, source.ids, read.asked("source"))
    return Contrast(pair, *sides, patches, answers)


def make_contrasts(model: Model, pairs: Sequence[PromptPair], reading: Reading, source_model: Model | None = None) -> tuple[Contrast, ...]:
    """All pairs as contrasts.

    Raises:
        UserError: what is wrong with any of the pairs, all together.
    """
    found, problems = [], []
    for pair in pairs:
        try:
            found.append(make_contrast(model, pair, reading, source_model))
        except UserError as error:
            problems.append(str(error) if str(error).startswith("pair ") else f"pair {pair.id!r}: {error}")
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise all_problems("pairs", problems)
    if not all(callable(outcome) for outcome in reading.outcomes):
        _tell_gap(model, CONTRASTS[reading.contrast](pairs[0]), reading.form)
    return tuple(found)


def _tell_gap(model: Model, pair: PromptPair, form: str) -> None:
    """Says where answers stand in whole conversations, where that is not right behind the prompt."""
    gap = render(model.tokenizer, pair, "base", form).gap
    if gap is None:
        notice(f"Outcomes are read right behind the prompt; in whole conversations {OTHERWISE}.")
    elif gap:
        notice(
            f"Outcomes are read right behind the prompt; in whole conversations this model's answers stand behind {quoted(gap)}. "
            f"To read them there, open the assistant's turn with it: --prefill, or the columns base_prefill and source_prefill."
        )
