"""One matched pair of prompts, checked when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmed.errors import UserError, quoted
from jaxmed.files import odd_text
from jaxmed.prompts.chat import Chat, check_chat

SPLITS = ("discovery", "heldout")
KINDS: dict[str, tuple[type, ...]] = {
    "target": (str, list, tuple),
    "foil": (str, list, tuple),
    "messages": (dict,),
    "extra": (dict,),
}
"""What a field of a pair may hold; the others hold texts."""


SPAN = "span_"
"""Columns of a pairs file whose names begin so say where a named span stands."""


WORDS = {"target": "a text or a list of texts", "foil": "a text or a list of texts", "messages": "an object", "extra": "an object"}


def expected(name: str) -> str:
    """What a field of a pair may hold, in words."""
    return WORDS.get(name, "a text")


@dataclass(frozen=True)
class PromptPair:
    """A pair of prompts that differ in the behaviour under study.

    Attributes:
        id: unique name.
        base: user message of the run that gets patched (for harm: the harmful request).
        source: user message of the run that values come from (its benign twin).
        target, foil: answer texts; the outcome is always target against foil (for harm: openings of an answer against
            openings of a refusal).
        category: label for grouping results.
        system: system message of both prompts.
        messages: full chats {"base": [...], "source": [...]} instead of `base` and `source`.
        base_prefill, source_prefill: opening of the assistant's turn.
        response: a fixed answer, for `sequence-logprob`.
        group: unit of resampling; pairs that share a template or topic share it. Default: the id.
        split: "discovery" or "heldout", or empty.
        control: "neutral" or "paraphrase" (or another word) for control pairs, else empty.
    """

    id: str
    base: str = ""
    source: str = ""
    target: Sequence[str] = ()
    foil: Sequence[str] = ()
    category: str = ""
    system: str | None = None
    messages: dict[str, Chat] | None = None
    base_prefill: str = ""
    source_prefill: str = ""
    response: str | None = None
    group: str = ""
    split: str = ""
    control: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def spans(self) -> tuple[tuple[str, str, str], ...]:
        """(name, text in base, text in source) of the columns `span_NAME`: a text, or two, as a list or with a bar between them."""
        found = []
        for column, given in self.extra.items():
            if not str(column).startswith(SPAN) or not given:
                continue
            texts = [part.strip() for part in given.split("|")] if isinstance(given, str) else given
            if not isinstance(texts, list | tuple) or len(texts) not in (1, 2) or not all(isinstance(text, str) and text for text in texts):
                raise UserError(f"pair {quoted(self.id)}: {quoted(column)} is {quoted(given)}; a text, or one of base and one of source.")
            found.append((str(column).removeprefix(SPAN), texts[0], texts[-1]))
        return tuple(found)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, KINDS.get(name, str)):
                raise UserError(f"pair {quoted(self.id)}: {name!r} is {quoted(value)}; {expected(name)} is expected.")
        if said := odd_text(vars(self)):
            raise UserError(f"pair {quoted(self.id)}: {said}.")
        for name in ("target", "foil"):
            texts = getattr(self, name)
            texts = (texts,) if isinstance(texts, str) else tuple(texts or ())
            if not all(isinstance(text, str) and text for text in texts):
                raise UserError(f"pair {quoted(self.id)}: {name!r} is a list of non-empty texts, not {quoted(list(texts))}.")
            object.__setattr__(self, name, texts)
        if not self.group:
            object.__setattr__(self, "group", self.id)
        if not self.id:
            raise UserError("a pair needs a non-empty 'id'.")
        if self.split and self.split not in SPLITS:
            raise UserError(f"pair {quoted(self.id)}: split {quoted(self.split)} is not one of {', '.join(SPLITS)}.")
        if self.messages is None and not (self.base and self.source):
            raise UserError(f"pair {quoted(self.id)}: needs 'base' and 'source' (user messages), or 'messages'.")
        if self.messages is not None and set(self.messages) != {"base", "source"}:
            raise UserError(f"pair {quoted(self.id)}: 'messages' is {{'base': [...], 'source': [...]}}, two lists of chat messages.")
        for side, chat in (self.messages or {}).items():
            try:
                check_chat(chat)
            except UserError as error:
                raise UserError(f"pair {quoted(self.id)}, {side}: {error}") from None

    def chat(self, side: str) -> list[dict[str, str]]:
        """The chat messages of one side, "base" or "source"."""
        if self.messages is not None:
            return list(self.messages[side])
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": getattr(self, side)}]

    def asked(self, side: str) -> str:
        """The user's last message on one side; empty where a chat has none."""
        return next((message["content"] for message in reversed(self.chat(side)) if message["role"] == "user"), "")

    def prefill(self, side: str) -> str:
        """The opening of the assistant's turn on one side."""
        return self.base_prefill if side == "base" else self.source_prefill
