"""Chats through a tokenizer's template, at a fixed date, and where their messages stand in the rendered text.

Nothing is searched for by its words: a message is found by rendering the chat once more with a mark in its place.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from jaxmed.errors import LONGEST, UserError
from jaxmed.prompts.chat import Chat, check_chat

DATE = datetime.datetime(2026, 1, 1)
"""The day that chat templates which print a date are shown; recorded with every run."""

Span = tuple[int, int]
MARK = "\ue0f5\ue0f6\ue0f7"
"""Stands in for a message: private-use characters, which no template trims, splits or changes the case of."""

INSIDE = 16
"""Places inside a message that a mark is tried at."""

_NOW = (
    "{%- macro strftime_now(format) -%}{%- set found = namespace(text=format) -%}"
    "{%- for name, value in fixed_dates.items() -%}{%- set found.text = found.text.replace(name, value) -%}{%- endfor -%}"
    "{{- found.text -}}{%- endmacro %}\n"
)
"""Its own line's end goes with it, so that the template begins a line, whose leading spaces may go too."""
_SETS_DATE = re.compile(r"\bset\s+date_string\s*=")
_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuVDFTRehnklPst" for flag in ("-", "_", "0", "^", "")]
_PERCENT = "\ue0f4"


def chat_template(tokenizer: Any) -> str:
    """The template that chats are rendered with.

    Raises:
        UserError: the tokenizer has none, or several of which none is the default.
    """
    need_tokenizer(tokenizer)
    held = getattr(tokenizer, "chat_template", None)
    if not held:
        raise UserError("This model's tokenizer has no chat template; feed plain text (--form text), or take one with --template-from.")
    if isinstance(held, dict) and "default" not in held:
        raise UserError(
            f"This tokenizer has chat templates named {', '.join(map(str, held))}, and none named default. Set one as `chat_template`."
        )
    return held["default"] if isinstance(held, dict) else held


def need_tokenizer(tokenizer: Any) -> None:
    """Raises a UserError where a model came without tokenizer files."""
    if tokenizer is None:
        raise UserError(
            "This model has no tokenizer: its folder has no tokenizer files (add tokenizer.json and tokenizer_config.json), or its GGUF "
            "file describes a tokenizer that transformers cannot build: its pre-tokenizer is not known, or its vocabulary does not hold "
            "together (load the Hugging Face folder of the model instead)."
        )


def render_chat(tokenizer: Any, chat: Chat, generation: bool, **more: Any) -> str:
    """A chat through the tokenizer's template, at the fixed date.

    Raises:
        UserError: no chat template; messages that are no texts; a chat that the template refuses.
    """
    template = chat_template(tokenizer)
    check_chat(chat)
    given = {"tokenize": False, "add_generation_prompt": generation, **_fixed_date(template), **more}
    try:
        return tokenizer.apply_chat_template(_in_parts(chat) if _needs_parts(tokenizer, template) else list(chat), **given)
    except Exception as error:  # a template is a program: it raises what it likes
        roles = [message["role"] for message in chat]
        raise UserError(
            f"The model's chat template refuses a chat of {', '.join(roles)}: {str(error)[:LONGEST]!r}. {_advice(roles)}"
        ) from None


def _in_parts(chat: Chat) -> list[dict[str, Any]]:
    """A chat whose contents are lists of parts, as the templates of models that see pictures want them."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]


_PARTS: dict[str, bool] = {}


def _needs_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template leaves out a message that is one text, and writes one that is a list of parts."""
    if template not in _PARTS:
        chat = [{"role": "user", "content": MARK}]
        _PARTS[template] = not _writes(tokenizer, template, chat) and _writes(tokenizer, template, _in_parts(chat))
    return _PARTS[template]


def _writes(tokenizer: Any, template: str, chat: Sequence[Any]) -> bool:
    try:
        return MARK in tokenizer.apply_chat_template(list(chat), tokenize=False, **_fixed_date(template))
    except Exception:  # a template is a program: it raises what it likes
        return False


def _advice(roles: Sequence[str]) -> str:
    if "system" in roles:
        return "Some templates take no system message: leave it out, or put its text before the user's."
    if any(one == following for one, following in pairwise(roles)):
        return "Let user and assistant take turns, the user first."
    return "Feed plain text (--form text), or take another model's template with --template-from."


def _fixed_date(template: str) -> dict[str, Any]:
    """Arguments that make a template print `DATE`: as the variable `date_string`, and as a macro in place of `strftime_now`.

    A template that sets `date_string` itself keeps what it says: a constant is fixed already. Functions do not reach a template, so the
    macro replaces every directive of a format by its value: whatever name the template gives the function, and wherever its format
    comes from.
    """
    day: dict[str, Any] = {} if _SETS_DATE.search(template) else {"date_string": DATE.strftime("%d %b %Y")}
    if "strftime_now" in template:
        values = {directive: DATE.strftime(directive) for directive in _DIRECTIVES}
        day["fixed_dates"] = {"%%": _PERCENT, **values, _PERCENT: "%"}
        day["chat_template"] = _NOW + template
    return day


def find_mark(rendered: str, marked: str) -> Span | None:
    """Where `rendered` has what stands as `MARK` in `marked`; None where the two differ elsewhere too. Of several places, the last."""
    pieces = marked.split(MARK)
    count = len(pieces) - 1
    if not count or not rendered.startswith(pieces[0]) or not rendered.endswith(pieces[-1]):
        return None
    size, rest = divmod(len(rendered) - sum(map(len, pieces)), count)
    end = len(rendered) - len(pieces[-1])
    return None if rest or size < 0 else (end - size, end)


def user_span(tokenizer: Any, chat: Chat, rendered: str, generation: bool = True) -> Span:
    """Characters of the last user message in a rendered chat, as the template writes it.

    Raises:
        UserError: no user message, or a template that leaves it out.
    """
    at = max((number for number, message in enumerate(chat) if message["role"] == "user"), default=None)
    if at is None:
        raise UserError("the chat has no user message.")
    text = chat[at]["content"].strip()
    marked = render_chat(tokenizer, [*chat[:at], {**chat[at], "content": MARK}, *chat[at + 1 :]], generation)
    found = find_mark(rendered, marked)
    if found is not None and rendered[slice(*found)].strip() == text:
        return found
    for before, after, cut in _cut_inside(tokenizer, chat, at, rendered, generation):  # the template changes the text, or reacts to it
        if found is not None:
            return found
        if before.endswith(text[:cut]) and after.startswith(text[cut:]):
            return len(before) - cut, len(before) - cut + len(text)
    raise UserError("the chat template does not keep the user's message verbatim, so its tokens cannot be found.")


def _cut_inside(tokenizer: Any, chat: Chat, at: int, rendered: str, generation: bool) -> Iterator[tuple[str, str, int]]:
    """What stands before and behind places inside message `at`, with how many characters of it precede them.

    Places where a mark inside the message changes nothing else: a template that reacts to a message as a whole does not to `MARK` alone.
    """
    whole = chat[at]["content"]
    text, spaces = whole.strip(), len(whole) - len(whole.lstrip())
    for cut in [*dict.fromkeys((len(text) // 2, *range(1, len(text))))][:INSIDE]:
        inside = {**chat[at], "content": whole[: spaces + cut] + MARK + whole[spaces + cut :]}
        before, mark, after = render_chat(tokenizer, [*chat[:at], inside, *chat[at + 1 :]], generation).rpartition(MARK)
        before = before.replace(MARK, "")  # a template may write a message twice
        if mark and before + after == rendered:
            yield before, after, cut


def answer_beginning(tokenizer: Any, chat: Chat, opening: str, text: str) -> str | None:
    """What follows `opening` (the chat with its generation header) where the assistant's turn begins with `text`.

    None where the template writes past turns another way than it asks for new ones, or takes no assistant turn.
    """
    try:
        whole = render_chat(tokenizer, [*chat, {"role": "assistant", "content": text + MARK}], False)
    except UserError:
        return None
    return whole[len(opening) : whole.rindex(MARK)] if whole.startswith(opening) and MARK in whole[len(opening) :] else None
