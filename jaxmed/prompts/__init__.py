"""Prompt pairs: records, readers, and the bundled files. No tokenizer and no model here."""

from jaxmed.prompts.pair import PromptPair
from jaxmed.prompts.readers import read_pairs

__all__ = ["PromptPair", "read_pairs"]
