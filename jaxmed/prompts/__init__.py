"""Prompt pairs and examples: records, readers, and the bundled files. No tokenizer and no model here."""

from jaxmed.prompts.examples import Example, read_examples
from jaxmed.prompts.pair import PromptPair
from jaxmed.prompts.readers import read_pairs

__all__ = ["Example", "PromptPair", "read_examples", "read_pairs"]
