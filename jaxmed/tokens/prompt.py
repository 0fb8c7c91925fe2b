"""A prompt as token ids: rendered in a form, with the places of the user's message and of the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.prompts.chat import Chat, check_chat
from jaxmed.prompts.examples import Example
from jaxmed.prompts.forms import find_form
from jaxmed.prompts.pair import PromptPair
from jaxmed.tokens.encode import decode_after, encode, follow
from jaxmed.tokens.template import Span, answer_beginning, render_chat, user_span

TAIL = 8
"""Tokens of a prompt that are decoded with what was written after it."""
Asked = PromptPair | Example | str | Chat
"""What can be rendered: a side of a pair, an example, a user message, or chat messages."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: what was tokenised.
        ids: int [T], the ids really fed, begin-of-sequence included exactly once where form and tokenizer have one.
        offsets: [T] pairs, the characters of `text` each token covers.
        user: characters of the user's (last) message in `text`, as the template writes it.
        header: characters from the end of the user's turn to the end of the prompt (generation header and prefill).
        message: the user's message as it was given.
        lead: what the form writes before an answer that follows: " " where the template itself puts a space there.
        trims: whether the template drops the spaces that an answer begins with.
        bos: whether begin-of-sequence comes first.
        gap: what whole conversations have between this prompt and an answer, such as an empty thought or the name of a channel; None where
            they do not begin as this prompt does.
    """

    text: str
    ids: np.ndarray
    offsets: tuple[Span, ...] = field(repr=False)
    user: Span = (0, 0)
    header: Span = (0, 0)
    message: str = ""
    lead: str = ""
    trims: bool = False
    bos: bool = True
    gap: str | None = ""


@dataclass(frozen=True)
class _Ask:
    name: str
    chat: Chat
    prefill: str


def render(tokenizer: Any, asked: Asked, side: str = "base", form: str = "chat") -> Prompt:
    """A prompt as token ids.

    Args:
        tokenizer: a model's tokenizer, or the model.
        asked: a `PromptPair` (of which `side` is taken), an `Example`, a user message, or chat messages.
        side: "base" or "source".
        form: a name in `prompts.forms.FORMS`.

    Raises:
        UserError: no tokenizer or chat template; an unknown form; a chat that the template refuses; a prompt without tokens.
    """
    tokenizer, ask, row = tokenizer_of(tokenizer), _ask(asked, side), find_form(form)
    try:
        check_chat(ask.chat)
        found = _parts(tokenizer, ask, form)
        text, user, header = found.pop("text"), found.pop("user"), found.pop("header")
        ids, offsets = encode(tokenizer, text, row.bos)
    except UserError as error:
        raise UserError(f"{ask.name}{error}") from None
    if not ids:
        raise UserError(f"{ask.name}the prompt has no tokens.")
    message = next(one["content"] for one in reversed(ask.chat) if one["role"] == "user")
    return Prompt(text, np.asarray(ids, np.int32), tuple(offsets), user, (header, len(text)), message, bos=row.bos, **found)


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model; a tokenizer as it is."""
    return model.tokenizer if hasattr(model, "params") else model


def _ask(asked: Asked, side: str) -> _Ask:
    if isinstance(asked, PromptPair):
        return _Ask(f"pair {asked.id!r}, {side}: ", asked.chat(side), asked.prefill(side))
    if isinstance(asked, Example):
        return _Ask(f"example {asked.id or asked.prompt[:40]!r}: ", example_chat(asked), asked.prefill)
    return _Ask("", [{"role": "user", "content": asked}] if isinstance(asked, str) else asked, "")


def example_chat(example: Example) -> Chat:
    """An example's prompt as chat messages."""
    system = [] if example.system is None else [{"role": "system", "content": example.system}]
    return [*system, {"role": "user", "content": example.prompt}]


def _parts(tokenizer: Any, ask: _Ask, form: str) -> dict[str, Any]:
    """Text, places and what precedes an answer, of a form."""
    if form == "chat":
        return _chat_parts(tokenizer, ask)
    row, users = find_form(form), [message["content"] for message in ask.chat if message["role"] == "user"]
    if len(users) != 1 or any(message["role"] == "assistant" for message in ask.chat):
        raise UserError(f"a chat of {len(ask.chat)} messages has no form {form!r}; use --form chat, or one user message.")
    before, after = row.prompt.split("{}")
    end = len(before) + len(users[0])
    text = before + users[0] + after + row.separator
    lead = row.lead
    if ask.prefill:
        text, lead = text + join(lead, False, ask.prefill), ""
    return {"text": text, "user": (len(before), end), "header": end, "lead": lead}


def _chat_parts(tokenizer: Any, ask: _Ask) -> dict[str, Any]:
    closed, opening = (render_chat(tokenizer, ask.chat, generation) for generation in (False, True))
    user = user_span(tokenizer, ask.chat, opening)
    header = len(closed) if opening.startswith(closed) and opening != closed else user[1]
    begun = answer_beginning(tokenizer, ask.chat, opening, "")
    if ask.prefill:
        whole = begun and begun.strip() and ask.prefill.startswith(begun)  # the template's own block, which it would write once more
        given = ask.prefill if whole else answer_beginning(tokenizer, ask.chat, opening, ask.prefill)
        return {"text": opening + (ask.prefill if given is None else given), "user": user, "header": header}
    lead, gap = ("", begun) if begun is None or begun.strip() else (begun, "")  # a block of its own: a model that is asked writes it or not
    trims = not lead.strip() and answer_beginning(tokenizer, ask.chat, opening, " ") == lead
    if opening.endswith(" ") and _merges(tokenizer, opening):
        lead = opening[len(opening.rstrip(" ")) :] + lead
        opening = opening.rstrip(" ")
    return {"text": opening, "user": user, "header": header, "lead": lead, "trims": trims, "gap": gap}


def _merges(tokenizer: Any, opening: str) -> bool:
    """Whether the tokenizer joins the space that a generation header ends with to the word that follows."""
    last = tokenizer.convert_ids_to_tokens(encode(tokenizer, opening)[0][-1])
    return any(token.startswith(last) and token != last for token in tokenizer.get_vocab())


def join(lead: str, trims: bool, text: str) -> str:
    """An answer's beginning as it stands behind the prompt; its own leading space and that of the form are one."""
    if trims:
        text = text.lstrip()
    return lead + (text[1:] if lead.endswith(" ") and text.startswith(" ") else text)


def answer_ids(tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
    """Token ids of an answer, or of its beginning, after a prompt: those that the whole conversation has there.

    Raises:
        UserError: the text would change the prompt's last tokens.
    """
    return follow(tokenizer, prompt.ids.tolist(), prompt.text, join(prompt.lead, prompt.trims, text), prompt.bos)


def written_text(tokenizer: Any, prompt: Prompt, ids: np.ndarray) -> str:
    """What tokens that were written after a prompt add to it, without the space that the form itself puts there."""
    return decode_after(tokenizer, prompt.ids[-TAIL:].tolist(), ids.tolist()).removeprefix(prompt.lead)


def prompt_ids(tokenizer: Any, example: Example, form: str = "chat") -> np.ndarray:
    """Token ids int32 [T] of an example's prompt alone, as a model is asked it."""
    return render(tokenizer, example, form=form).ids
