"""Examples as the tokens that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxmed.batching.batches import Batch
from jaxmed.errors import UserError
from jaxmed.prompts.examples import Example
from jaxmed.prompts.forms import FORMS, check_form
from jaxmed.tokens import Answered, encode_example


def encode(
    tokenizer: Any, examples: Sequence[Example], form: str = "plain", scored_separator: bool = False, most: int = 0
) -> list[Answered]:
    """Examples as tokens, without begin-of-sequence but in "chat".

    Args:
        scored_separator: whether what stands between prompt and response is scored with the response.
        most: limit of an example's tokens; what is longer loses its end.

    Raises:
        UserError: an unknown form; no examples; one without response, or whose prompt leaves no room for it.
    """
    check_form(form)
    if not examples:
        raise UserError("There are no examples to score.")
    around, separator = FORMS[form]
    found = []
    for example in examples:
        asked = replace(example, prompt=around.format(example.prompt))
        one = encode_example(tokenizer, asked, form != "chat", most or None, separator)
        if scored_separator and form != "chat":
            alone = tokenizer(asked.prompt, add_special_tokens=False)["input_ids"]
            one = replace(one, prompt=max(1, min(len(alone), one.prompt - 1)))
        found.append(one)
    return found


def response_tokens(batch: Batch) -> np.ndarray:
    """float32 [B,T]: 1 at tokens of responses."""
    found = np.zeros(batch.tokens.shape, np.float32)
    rows, at = np.nonzero(batch.weight > 0)
    found[rows, batch.column[rows, at] + 1] = 1
    return found
