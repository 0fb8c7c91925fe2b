"""Which tokens end an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmed.errors import UserError, quoted

ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_role|>", "<|end_of_text|>"),
    *("<|return|>", "</s>", "<EOT>", "<turn|>", "<end_of_utterance>"),
)
"""Control tokens that end an assistant's turn, where a checkpoint does not say what does."""


def end_tokens(tokenizer: Any, generation: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None) -> list[int]:
    """Tokens that end an answer, ascending: those that generation_config.json names, as transformers ends.

    Where there is no such file or entry: those that config.json and the tokenizer name, and the `ENDS` that are control tokens; a
    vocabulary may hold the same letters as ordinary text.

    Raises:
        UserError: an entry that is neither a token's id nor a list of them.
    """
    if named := _numbers(generation, "generation_config.json"):
        return sorted(named)
    found = _numbers(config, "config.json")
    if tokenizer is not None:
        vocabulary, control = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
        control |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        own = tokenizer.eos_token_id
        found |= ({own} if own is not None else set()) | {vocabulary[end] for end in ENDS if vocabulary.get(end) in control}
    return sorted(found)


def _numbers(given: Mapping[str, Any] | None, file: str) -> set[int]:
    """The numbers that the entry `eos_token_id` of a file names: one, several, or none."""
    value = (given or {}).get("eos_token_id")
    named = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(one, int) or isinstance(one, bool) for one in named):
        raise UserError(f"{file} has {quoted(value)} as eos_token_id; a token's id is expected, or a list of ids. Correct the file.")
    return set(named)
