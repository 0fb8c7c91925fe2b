"""Texts as token ids with the characters they cover, begin-of-sequence exactly once, and what follows a prompt in its context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tokenizers import processors

from jaxmed.errors import UserError, quoted
from jaxmed.files import odd_text
from jaxmed.tokens.template import Span, need_tokenizer


def encode(tokenizer: Any, text: str, bos: bool = True) -> tuple[list[int], list[Span]]:
    """Token ids of a text and the characters they cover.

    Args:
        bos: begin-of-sequence comes first, exactly once, where the tokenizer adds one.

    Raises:
        UserError: no tokenizer, or one that does not know which characters its tokens cover; no text, or one that UTF-8 cannot hold.
    """
    need_tokenizer(tokenizer)
    if not isinstance(text, str):
        raise UserError(f"A text is expected, not {quoted(text)}.")
    if said := odd_text(text):
        raise UserError(f"{quoted(text)} {said.removeprefix('a text ')}.")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("This tokenizer does not say which characters its tokens cover; load a folder with a tokenizer.json.")
    with _whole_offsets(tokenizer.backend_tokenizer):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    start = tokenizer.bos_token_id
    if bos and start is not None and ids[:1] != [start] and start in tokenizer("a")["input_ids"][:1]:
        ids, offsets = [start, *ids], [(0, 0), *offsets]
    return ids, offsets


@contextmanager
def _whole_offsets(backend: Any) -> Iterator[None]:
    """Byte-level tokenizers may leave the spaces out of the characters a token covers; here they do not."""
    kept = backend.post_processor
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    try:
        yield
    finally:
        backend.post_processor = kept


def text_ids(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids int32 [T] of plain text, begin-of-sequence exactly once where the tokenizer adds one."""
    return np.asarray(encode(tokenizer, text)[0], np.int32)


def show_tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as a message shows them: `'Sure' + ' thing'`."""
    return " + ".join(repr(_shown(tokenizer, int(number))) for number in ids) or "(nothing)"


def _shown(tokenizer: Any, number: int) -> str:
    token = tokenizer.convert_ids_to_tokens(number)
    return token.replace("▁", " ") if isinstance(token, str) and "▁" in token else tokenizer.decode([number])


def follow(tokenizer: Any, ids: Sequence[int], before: str, text: str, bos: bool = True) -> list[int]:
    """Token ids of `text` after a prompt, as the whole of both is tokenised.

    Args:
        ids: those of the prompt.
        before: the prompt's text.

    Raises:
        UserError: the prompt's last tokens would be others with the text behind them; the message shows both.
    """
    whole = encode(tokenizer, before + text, bos)[0]
    if whole[: len(ids)] != list(ids):
        raise UserError(f"{text!r} cannot follow this prompt: {seam(tokenizer, ids, whole)}.")
    return whole[len(ids) :]


def seam(tokenizer: Any, alone: Sequence[int], whole: Sequence[int]) -> str:
    """Says how the end of a prompt is tokenised alone, and how with what follows."""
    same = next((at for at, pair in enumerate(zip(alone, whole, strict=False)) if pair[0] != pair[1]), min(len(alone), len(whole)))
    after = list(whole[same : same + 3])
    shown = [f"{show_tokens(tokenizer, part)} (ids {', '.join(map(str, part))})" for part in (list(alone[same:]), after)]
    advice = "spaces and newlines at the seam are joined: leave them out at the prompt's end, or at the text's beginning"
    return f"alone it ends in {shown[0]}, and with the text in {shown[1]}; {advice}"


def decode_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int], special: bool = False) -> str:
    """The text of tokens behind others: alone, some tokenizers drop the space that a text begins with.

    Args:
        special: control tokens are shown.
    """
    known = tokenizer.decode(before, skip_special_tokens=not special)
    whole = tokenizer.decode([*before, *ids], skip_special_tokens=not special)
    return whole[len(known) :] if known and whole.startswith(known) else tokenizer.decode(ids, skip_special_tokens=not special)


def has_text(tokenizer: Any, last: int, written: Sequence[int], texts: Sequence[str]) -> bool:
    """Whether one of `texts` stands at the end of the tokens that were written after the token `last`."""
    ids = [last, *written][-max(len(text.encode()) for text in texts) - 2 :]  # a token has a byte at least
    shown = decode_after(tokenizer, ids[:1], ids[1:], special=True)
    return any(text in shown for text in texts)
