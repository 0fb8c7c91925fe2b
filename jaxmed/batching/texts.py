"""Examples as the tokens that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.batching.batches import Batch
from jaxmed.errors import UserError
from jaxmed.prompts.examples import Example
from jaxmed.tokens import TokenizedExample, encode_example, tell_seams


def encode(
    tokenizer: Any, examples: Sequence[Example], form: str = "plain", scored_separator: bool = False, most: int = 0
) -> list[TokenizedExample]:
    """Examples as tokens.

    Args:
        form: how prompt and response are joined; see `prompts.forms`.
        scored_separator: whether what stands between prompt and response is scored with the response.
        most: limit of an example's tokens; what is longer loses its end.

    Raises:
        UserError: an unknown form; no examples; one without response, or whose prompt leaves no room for it.
    """
    if not examples:
        raise UserError("There are no examples to score.")
    found = [encode_example(tokenizer, example, form, most or None, scored_separator=scored_separator) for example in examples]
    tell_seams(found)
    return found


def response_tokens(batch: Batch) -> np.ndarray:
    """float32 [B,T]: 1 at tokens of responses."""
    found = np.zeros(batch.tokens.shape, np.float32)
    rows, at = np.nonzero(batch.weight > 0)
    found[rows, batch.column[rows, at] + 1] = 1
    return found
