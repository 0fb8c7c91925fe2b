"""Where a position lies in a prompt, and which tokens of two prompts belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxmed.errors import UserError, unknown
from jaxmed.tokens.prompt import Prompt
from jaxmed.tokens.template import Span

WORDS = ("last", "user_last", "header", "user", "each", "spans", "all")
BY_POSITION = ("each", "spans")
"""Words that stand for several patches, each with an effect of its own."""
NamedSpan = tuple[str, str, str]
"""(name, text in base, text in source)."""


def locate(prompt: Prompt, position: str | int) -> list[int]:
    """Token indices of a position in one prompt, ascending.

    Args:
        position: "last", "user_last", "header", "user", "all", an index (negative counts from the end), or a substring: its first
            place in the user's message, or else in the whole prompt.

    Raises:
        UserError: index out of range, or a substring that does not occur.
    """
    count = len(prompt.ids)
    if isinstance(position, str) and re.fullmatch(r"[+-]?[0-9]+", position):
        position = int(position)
    if isinstance(position, int):
        if not -count <= position < count:
            raise UserError(f"Position {position} is out of range: the prompt has {count} tokens (legal: {-count} to {count - 1}).")
        return [position % count]
    if position == "last":
        return [count - 1]
    if position == "all":
        return list(range(count))
    spans = {"user": prompt.user, "user_last": prompt.user, "header": prompt.header}
    if position in spans:
        found = _covering(prompt, spans[position])
        if not found:
            raise UserError(f"This prompt has no {position!r} tokens (plain text has no generation header).")
        return found[-1:] if position == "user_last" else found
    if not position or (span := _find(prompt, position)) is None:
        raise unknown("position", position, [*WORDS, "an integer"], "Or give a substring that occurs in both prompts.")
    return _covering(prompt, span)


def _find(prompt: Prompt, text: str) -> Span | None:
    """The first place of a text in the user's message, as it is written or as it was given; else in the whole prompt."""
    begin, end = prompt.user
    at = prompt.text.find(text, begin, end)
    given = next((one for one in (prompt.message, prompt.message.strip()) if len(one) == end - begin), "")
    if at < 0 and text in given:
        at = begin + given.index(text)  # the template changed letters
    if at < 0:
        at = prompt.text.find(text)
    return None if at < 0 else (at, at + len(text))


def _covering(prompt: Prompt, span: Span) -> list[int]:
    """The tokens from the first that shares a character with the span to the last."""
    found = [i for i, (begin, end) in enumerate(prompt.offsets) if begin < span[1] and end > span[0] and end > begin]
    return list(range(found[0], found[-1] + 1)) if found else []


@dataclass(frozen=True)
class Patch:
    """Tokens that are patched together: equally many in base and source, ascending. `label` counts from the right, -1 last, or is the
    name of a span."""

    base: tuple[int, ...]
    source: tuple[int, ...]
    label: int | str = -1


def align(base: Prompt, source: Prompt, position: str | int, spans: Sequence[NamedSpan] = ()) -> list[Patch]:
    """The patches a position stands for: one, with "each" one per position that exists in both prompts, counted from the right, and with
    "spans" one per named span, one for the rest of the request, and one for the header.

    Raises:
        UserError: base and source cover different numbers of tokens, so that they cannot be paired; a span that does not occur.
    """
    if position == "spans":
        return _align_spans(base, source, spans)
    if position == "each":
        common = min(len(base.ids), len(source.ids))
        return [Patch((len(base.ids) - k,), (len(source.ids) - k,), -k) for k in range(common, 0, -1)]
    at_base, at_source = locate(base, position), locate(source, position)
    if len(at_base) != len(at_source):
        raise UserError(
            f"Position {position!r} covers {len(at_base)} tokens in base and {len(at_source)} in source, so they cannot be paired. "
            "Use last, user_last, header, each or an index counted from the end, or pairs of equal length."
        )
    return [Patch(tuple(at_base), tuple(at_source), at_base[-1] - len(base.ids))]


REST, REQUEST, HEADER = "rest of the request", "request", "header"
"""Names of the spans that every chat has."""


def _align_spans(base: Prompt, source: Prompt, spans: Sequence[NamedSpan]) -> list[Patch]:
    """A patch per span. Of spans with unequal numbers of tokens those count that exist in both from the right."""
    found, taken = [], (set[int](), set[int]())
    for name, *texts in spans:
        at = [_place(prompt, text, name) for prompt, text in zip((base, source), texts, strict=True)]
        if overlap := [i for one, used in zip(at, taken, strict=True) for i in one if i in used]:
            raise UserError(f"span {name!r} shares token {overlap[0]} with another span.")
        found.append((name, *at))
        for one, used in zip(at, taken, strict=True):
            used.update(one)
    rest = [[i for i in _covering(one, one.user) if i not in used] for one, used in zip((base, source), taken, strict=True)]
    headers = [_covering(one, one.header) for one in (base, source)]
    found += [(REST if spans else REQUEST, *rest), (HEADER, *headers)]
    return [Patch(tuple(b[-min(len(b), len(s)) :]), tuple(s[-min(len(b), len(s)) :]), name) for name, b, s in found if b and s]


def _place(prompt: Prompt, text: str, name: str) -> list[int]:
    span = _find(prompt, text) if text else None
    if span is None:
        raise UserError(f"span {name!r}: {text!r} does not occur in {prompt.message!r}.")
    return _covering(prompt, span)
