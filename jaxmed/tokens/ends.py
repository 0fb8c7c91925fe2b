"""Which tokens end an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_role|>", "<|end_of_text|>", "<|return|>", "</s>")
"""Control tokens that end an assistant's turn, where a checkpoint does not say what does."""


def end_tokens(tokenizer: Any, generation: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None) -> list[int]:
    """Tokens that end an answer, ascending: those that generation_config.json names, as transformers ends.

    Where there is no such file or entry: those that config.json and the tokenizer name, and the `ENDS` that are control tokens; a
    vocabulary may hold the same letters as ordinary text.
    """
    if named := _numbers((generation or {}).get("eos_token_id")):
        return sorted(named)
    found = _numbers((config or {}).get("eos_token_id"))
    if tokenizer is not None:
        vocabulary, control = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
        control |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        found |= _numbers(tokenizer.eos_token_id) | {vocabulary[end] for end in ENDS if vocabulary.get(end) in control}
    return sorted(found)


def _numbers(value: Any) -> set[int]:
    """The numbers that an entry names: one, several, or none."""
    return {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int) and not isinstance(one, bool)}
