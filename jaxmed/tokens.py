"""From messages to token ids: chat template, positions and spans, packing of answers, buckets of lengths."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.prompts.examples import Example
from jaxmed.prompts.pair import PromptPair

DATE = datetime.datetime(2026, 1, 1)
"""The day that chat templates which print a date are shown; recorded with every run."""

WORDS = ("last", "user_last", "header", "user", "each", "all")
BUCKETS = tuple(int(b) for b in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192))
WINDOW_BUCKETS = (1, 2, 4, 6, *BUCKETS)


def bucket(length: int, sizes: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `length`; beyond the last one, multiples of 4,096."""
    return next((size for size in sizes if size >= length), -(-length // 4096) * 4096)


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: what was tokenised.
        ids: int [T], the ids really fed, begin-of-sequence included exactly once where the tokenizer has one.
        offsets: [T] pairs, the characters of `text` each token covers.
        user: characters of the user's (last) message in `text`; of all of it for plain text.
        header: characters from the end of the user's turn to the end of the prompt (generation header and prefill).
    """

    text: str
    ids: np.ndarray
    offsets: tuple[tuple[int, int], ...] = field(repr=False)
    user: tuple[int, int] = (0, 0)
    header: tuple[int, int] = (0, 0)


def render(tokenizer: Any, pair: PromptPair, side: str, raw: bool = False) -> Prompt:
    """One side of a pair as token ids.

    Raises:
        UserError: no tokenizer or chat template, or a prompt without tokens.
    """
    need_tokenizer(tokenizer)
    if raw:
        text = (pair.base if side == "base" else pair.source) + pair.prefill(side)
        user, header = (0, len(text)), (len(text), len(text))
    else:
        text, user, header = _render_chat(tokenizer, pair, side)
    ids, offsets = _encode(tokenizer, text)
    if not ids:
        raise UserError(f"pair {pair.id!r}: the {side} prompt has no tokens.")
    return Prompt(text, np.asarray(ids, np.int32), tuple(offsets), user, header)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and the characters they cover, begin-of-sequence exactly once where the tokenizer adds one."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    start = tokenizer.bos_token_id
    adds_start = start is not None and start in tokenizer("a")["input_ids"][:1]
    if adds_start and ids[:1] != [start]:
        ids, offsets = [start, *ids], [(0, 0), *offsets]
    return ids, offsets


@dataclass(frozen=True)
class Answered:
    """A prompt and its response as tokens.

    Attributes:
        ids: int [T], both.
        prompt: number of prompt tokens; the response's tokens follow them.
        cut: response tokens that were cut off because the limit is reached.
    """

    ids: np.ndarray
    prompt: int
    cut: int = 0


def encode_example(
    tokenizer: Any, example: Example, raw: bool = False, most: int | None = None, separator: str = "\n", most_response: int | None = None
) -> Answered:
    """An example as token ids. Prompt and response are tokenised apart, as when the model answers, then joined.

    Args:
        raw: prompt, separator, response, without chat template, begin-of-sequence or end; else the chat template, whose end of the
            assistant's turn belongs to the response.
        most: limit of the tokens; what is longer loses the end of its response.
        most_response: limit of the response's tokens.

    Raises:
        UserError: no tokenizer or chat template; a prompt that leaves no room for a response; a response without tokens.
    """
    need_tokenizer(tokenizer)
    prompt, text = _encode_prompt(tokenizer, example, raw, separator)
    response = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not response or not prompt:
        raise UserError(f"example {example.id or example.prompt[:40]!r} has no tokens in its {'response' if prompt else 'prompt'}.")
    room = min(most_response or len(response), len(response) if most is None else most - len(prompt))
    if room < 1:
        raise UserError(f"example {example.id or example.prompt[:40]!r}: the prompt has {len(prompt)} tokens, and the limit is {most}.")
    return Answered(np.asarray(prompt + response[:room], np.int32), len(prompt), max(0, len(response) - room))


def prompt_ids(tokenizer: Any, example: Example, raw: bool = False, separator: str = "\n") -> np.ndarray:
    """Token ids of an example's prompt alone, as `encode_example` makes them."""
    need_tokenizer(tokenizer)
    return np.asarray(_encode_prompt(tokenizer, example, raw, separator)[0], np.int32)


def text_ids(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of plain text, begin-of-sequence exactly once where the tokenizer adds one."""
    need_tokenizer(tokenizer)
    return np.asarray(_encode(tokenizer, text)[0], np.int32)


def _encode_prompt(tokenizer: Any, example: Example, raw: bool, separator: str) -> tuple[list[int], str]:
    """The prompt's token ids, and the text of the response."""
    if raw:
        return list(tokenizer(example.prompt + separator + example.prefill, add_special_tokens=False)["input_ids"]), example.response
    opening, response = _chat_turns(tokenizer, example)
    return _encode(tokenizer, opening + example.prefill)[0], response


def _chat_turns(tokenizer: Any, example: Example) -> tuple[str, str]:
    """The rendered prompt with the assistant's header, and the rendered answer with the end of its turn."""
    system = [] if example.system is None else [{"role": "system", "content": example.system}]
    chat = [*system, {"role": "user", "content": example.prompt}]
    opening = render_chat(tokenizer, chat, True)
    whole = render_chat(tokenizer, [*chat, {"role": "assistant", "content": example.response}], False)
    if whole.startswith(opening) and example.response.strip() in whole[len(opening) :]:
        return opening, whole[len(opening) :].rstrip()
    return opening, example.response + (tokenizer.eos_token or "")  # a template that writes past answers another way


def need_tokenizer(tokenizer: Any) -> None:
    """Raises a UserError where a model came without tokenizer files."""
    if tokenizer is None:
        raise UserError(
            "This model has no tokenizer: its folder has no tokenizer files (add tokenizer.json and "
            "tokenizer_config.json), or its GGUF file "
            "describes a tokenizer that transformers cannot build (load the Hugging Face folder of the model instead)."
        )


def _render_chat(tokenizer: Any, pair: PromptPair, side: str) -> tuple[str, tuple[int, int], tuple[int, int]]:
    chat = pair.chat(side)
    texts = [render_chat(tokenizer, chat, generation) for generation in (False, True)]
    message = next((m["content"] for m in reversed(chat) if m["role"] == "user"), None)
    if message is None:
        raise UserError(f"pair {pair.id!r}: the {side} chat has no user message.")
    begin = texts[1].rfind(message.strip())
    if begin < 0:
        raise UserError(f"pair {pair.id!r}: the chat template does not keep the user's message verbatim, so its tokens cannot be found.")
    end = begin + len(message.strip())
    text = texts[1] + pair.prefill(side)
    header = len(texts[0]) if texts[1].startswith(texts[0]) else end
    return text, (begin, end), (header, len(text))


def render_chat(tokenizer: Any, chat: list[dict[str, str]], generation: bool, **more: Any) -> str:
    """A chat through the tokenizer's template, at the fixed date."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("This model's tokenizer has no chat template; feed plain text (--raw), or take one with --template-from.")
    day = _fixed_date(tokenizer.chat_template)
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation, **day, **more)


def _fixed_date(template: Any) -> dict[str, Any]:
    """Arguments that make a template print `DATE`: as the variable `date_string`, and as a macro in place of `strftime_now`."""
    day: dict[str, Any] = {"date_string": DATE.strftime("%d %b %Y")}
    if isinstance(template, str) and "strftime_now" in template:
        formats = re.findall(r"strftime_now\(\s*['\"]([^'\"]*)['\"]", template)
        day["fixed_dates"] = {form: DATE.strftime(form) for form in formats}
        macro = "{%- macro strftime_now(form) -%}{{ fixed_dates[form] }}{%- endmacro -%}"
        day["chat_template"] = macro + template
    return day


def _covering(prompt: Prompt, span: tuple[int, int]) -> list[int]:
    return [i for i, (a, b) in enumerate(prompt.offsets) if a < span[1] and b > span[0] and b > a]


def locate(prompt: Prompt, position: str | int) -> list[int]:
    """Token indices of a position in one prompt, ascending.

    Args:
        position: "last", "user_last", "header", "user", "all", an index (negative counts from the end), or a substring.

    Raises:
        UserError: index out of range, or a substring that does not occur.
    """
    count = len(prompt.ids)
    if isinstance(position, str) and position.lstrip("-").isdigit():
        position = int(position)
    if isinstance(position, int):
        if not -count <= position < count:
            raise UserError(f"Position {position} is out of range: the prompt has {count} tokens (legal: {-count} to {count - 1}).")
        return [position % count]
    if position == "last":
        return [count - 1]
    if position == "all":
        return list(range(count))
    spans = {"user": prompt.user, "user_last": (prompt.user[1] - 1, prompt.user[1]), "header": prompt.header}
    if position in spans:
        found = _covering(prompt, spans[position])
        if not found:
            raise UserError(f"This prompt has no {position!r} tokens (plain text has no generation header).")
        return found[-1:] if position == "user_last" else found
    begin = prompt.text.find(position)
    if begin < 0 or not position:
        raise unknown("position", position, [*WORDS, "an integer"], "Or give a substring that occurs in both prompts.")
    return _covering(prompt, (begin, begin + len(position)))


@dataclass(frozen=True)
class Patch:
    """Tokens that are patched together: equally many in base and source, ascending. `label` counts from the right, -1 last."""

    base: tuple[int, ...]
    source: tuple[int, ...]
    label: int = -1


def align(base: Prompt, source: Prompt, position: str | int) -> list[Patch]:
    """The patches a position stands for: one, or with "each" one per position that exists in both prompts, counted from the right.

    Raises:
        UserError: base and source cover different numbers of tokens, so that they cannot be paired.
    """
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


@dataclass(frozen=True)
class Packed:
    """A prompt with its answer texts as branches, padded to a bucket: every answer sees the prompt and itself alone.

    Attributes:
        tokens: int [T]; prompt, then the answers' tokens (without each answer's last, which is only predicted), then padding.
        position: int [T], RoPE positions.
        visible: bool [T, T].
        prompt: number of prompt tokens.
        used: number of tokens that are not padding.
        readers: per answer, per answer token, the column whose logits predict it.
    """

    tokens: np.ndarray
    position: np.ndarray
    visible: np.ndarray
    prompt: int
    used: int
    readers: tuple[tuple[int, ...], ...]


def pack(prompt: np.ndarray, answers: Sequence[Sequence[int]], size: int | None = None) -> Packed:
    """Packs a prompt and its answers into one row of `size` columns (default: the bucket)."""
    count = len(prompt)
    used = count + sum(len(answer) - 1 for answer in answers)
    size = bucket(used) if size is None else size
    tokens, position = np.zeros(size, np.int32), np.zeros(size, np.int32)
    visible = np.eye(size, dtype=bool)
    tokens[:count], position[:count] = prompt, np.arange(count)
    visible[:count, :count] = np.tril(np.ones((count, count), bool))
    column, readers = count, []
    for answer in answers:
        fed = len(answer) - 1
        here = slice(column, column + fed)
        tokens[here], position[here] = answer[:-1], count + np.arange(fed)
        visible[here, :count] = True
        visible[here, here] = np.tril(np.ones((fed, fed), bool))
        readers.append((count - 1, *range(column, column + fed)))
        column += fed
    return Packed(tokens, position, visible, count, used, tuple(readers))
