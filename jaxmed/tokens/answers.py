"""Prompts with their whole responses as token ids: what is trained on, scored and pruned for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.errors import UserError, notice
from jaxmed.prompts.examples import Example
from jaxmed.prompts.forms import find_form
from jaxmed.tokens.encode import encode, seam
from jaxmed.tokens.prompt import example_chat, render
from jaxmed.tokens.template import MARK, Span, answer_beginning, find_mark, render_chat

OTHERWISE = "the chat template writes past turns another way than it asks for new ones"


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and its response as tokens.

    Attributes:
        ids: int [T], both.
        prompt: number of prompt tokens; the response's tokens follow them.
        cut: response tokens that were cut off because the limit is reached.
        seam: where the prompt's last tokens are others with the response behind them: what they are alone, and what together.
    """

    ids: np.ndarray
    prompt: int
    cut: int = 0
    seam: str = ""


def encode_example(
    tokenizer: Any,
    example: Example,
    form: str = "chat",
    most: int | None = None,
    most_response: int | None = None,
    scored_separator: bool = False,
) -> TokenizedExample:
    """An example as token ids: those of the whole conversation, rendered and tokenised once.

    A token that holds the end of the prompt and the beginning of the response belongs to the response. With "chat", the end of the
    assistant's turn belongs to the response too.

    Args:
        most: limit of the tokens; what is longer loses the end of its response.
        most_response: limit of the response's tokens.
        scored_separator: what another form than "chat" writes between prompt and response belongs to the response.

    Raises:
        UserError: no tokenizer or chat template; a prompt that leaves no room for a response; a response without tokens.
    """
    prompt, name = render(tokenizer, example, form=form), f"example {example.id or example.prompt[:40]!r}"
    text, begin, end = _whole_chat(tokenizer, example, prompt.text) if form == "chat" else _whole_text(example, form, prompt.text)
    ids, offsets = encode(tokenizer, text, prompt.bos)
    ids = ids[: sum(span[0] < end or span[1] <= 0 for span in offsets)]
    same = begin == len(prompt.text) and ids[: len(prompt.ids)] == prompt.ids.tolist()
    count = len(prompt.ids) if same else _tokens_before(offsets, begin)
    said = "" if same else seam(tokenizer, prompt.ids.tolist(), ids) if begin == len(prompt.text) else OTHERWISE
    if scored_separator and form != "chat":
        count = max(1, min(_tokens_before(offsets, prompt.user[1] + len(find_form(form).prompt.split("{}")[1])), count - 1))
    if not 0 < count < len(ids):
        raise UserError(f"{name} has no tokens in its {'response' if count else 'prompt'}.")
    found = len(ids) - count
    room = min(most_response or found, found if most is None else most - count)
    if room < 1:
        raise UserError(f"{name}: the prompt has {count} tokens, and the limit is {most}.")
    return TokenizedExample(np.asarray(ids[: count + room], np.int32), count, max(0, found - room), said)


def _tokens_before(offsets: Sequence[Span], end: int) -> int:
    """How many tokens lie before character `end` altogether."""
    return next((at for at, span in enumerate(offsets) if span[1] > end), len(offsets))


def _whole_text(example: Example, form: str, opening: str) -> tuple[str, int, int]:
    """The whole text, and where the response begins and ends."""
    text = opening + ("" if example.prefill else find_form(form).lead) + example.response
    return text, len(opening), len(text)


def _whole_chat(tokenizer: Any, example: Example, opening: str) -> tuple[str, int, int]:
    """The whole conversation, where the response begins, and where the end of the assistant's turn ends."""
    chat, content = example_chat(example), example.prefill + example.response
    answered = [render_chat(tokenizer, [*chat, {"role": "assistant", "content": text}], False) for text in (content, MARK)]
    span = find_mark(*answered)
    whole, end = answered[0], len(answered[0].rstrip())
    if whole.startswith(opening) and (span is None or len(opening) <= span[1]):
        return whole, len(opening), end
    if span is None:  # the template writes past answers another way than it asks for new ones
        whole = opening + example.response + (tokenizer.eos_token or "")
        return whole, len(opening), len(whole)
    skipped = answer_beginning(tokenizer, chat, whole[: span[0]], example.prefill) if example.prefill else ""
    return whole, span[0] + len(skipped or ""), end


def tell_seams(examples: Sequence[TokenizedExample]) -> None:
    """Tells the user where responses are tokenised together with the end of their prompts."""
    merged = [one.seam for one in examples if one.seam]
    if merged:
        notice(f"{len(merged)} of {len(examples)} prompts have other tokens with their responses than alone: {merged[0]}.")
