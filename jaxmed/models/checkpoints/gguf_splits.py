"""How the text of byte-level vocabularies is split before merges, by the pre-tokenizer's name in GGUF files, as llama.cpp reads them.

Patterns are applied one after the other, each to what the ones before it left; names that only transformers knows are in its own table.
"""

from __future__ import annotations

ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS_OF_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS_OF_LINES}"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
SEED = QWEN2.replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+")
CASED = r"[[\p{Lu}\p{Ll}\p{Lt}]&&[^\x{1D400}-\x{1D7FF}]]"
CHINESE = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
MARKS = r"[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
DEEPSEEK3 = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + ENDS_OF_LINES
SENTENCES = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"
SYMBOLS = r"[\p{P}\$\+<=>\^~\|]+"

_NAMES: dict[str, tuple[str, ...]] = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert": (GPT2,),
    "smollm refact starcoder command-r codeshell exaone minerva-7b mellum2": (r"\p{N}", GPT2),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": (QWEN2,),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe glm4 glm5": (LLAMA3,),
    "minicpm5": (r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+")),
    "deepseek-llm": (r"[\r\n]", rf"\s?{CASED}+", rf"\s?{MARKS}", r"\s+$", CHINESE, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, r"\p{N}"),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (r"\p{N}{1,3}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+", DEEPSEEK3),
    "falcon": (SYMBOLS.replace("|]", "|`]"), GPT2, r"[0-9][0-9][0-9]"),
    "bloom poro-chat gpt3-finnish": (SENTENCES,),
    "viking": (SENTENCES, r"\p{N}"),
    "seed-coder": (SEED,),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "default": (SYMBOLS, GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
SPLITS: dict[str, tuple[str, ...]] = {name: patterns for names, patterns in _NAMES.items() for name in names.split()}
"""Patterns by name; "default" is that of files which name none."""

WHOLE_WORDS = {*"llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken glm4 glm5 minicpm5".split()}
"""Pre-tokenizers whose words are one token where the vocabulary holds them, whatever merges would make of them."""
STARTED = {*"llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon".split()}
"""Pre-tokenizers that begin-of-sequence is the default with."""


def find_split(name: str | None) -> tuple[str, ...] | None:
    """The patterns of a pre-tokenizer; None where it is not known."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = SPLITS.get(name or "default")
    return known or ((GGUF_PRE_TOKENIZER_SPLITS[name],) if name in GGUF_PRE_TOKENIZER_SPLITS else None)
