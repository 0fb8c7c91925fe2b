"""Text from a model: one program reads a batch of prompts, others write token by token from the key/value cache.

Interventions are arguments here too: an edit may act on the prompts' tokens, on the written ones, or on both, and entries that
name a row of the batch act on that row alone, so that a hundred interventions run at once.
"""

from jaxmed.generation.following import Following
from jaxmed.generation.texts import ROWS, WHERE, cut_at, generate, generate_ids, stop_tokens

__all__ = ["ROWS", "WHERE", "Following", "cut_at", "generate", "generate_ids", "stop_tokens"]
