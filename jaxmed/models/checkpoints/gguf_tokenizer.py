"""The tokenizer that a GGUF file's metadata describes, by transformers' own converter (private there: pinned, and its ids are tested)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GPT2_SPLITS = ("gpt-2", "mpt", "olmo", "jais", "trillion")
"""Pre-tokenizers that split text as GPT-2's does."""
DIGITS_APART = ("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b")
"""Pre-tokenizers that take every digit out first, and split the rest as GPT-2's does."""
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build_tokenizer(metadata: Mapping[str, Any], architecture: str) -> Any:
    """A transformers tokenizer; None where the metadata describes none, or one of a kind that is not understood."""
    ours = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
    if not ours.get("ggml.tokens") or not _known_split(ours) or not _merges_hold(ours):
        return None
    try:
        return _convert(ours, architecture)
    except Exception:  # the converter, and the library under it, raise many types on vocabularies that do not hold together
        return None


def _convert(ours: Mapping[str, Any], architecture: str) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    described = {new: ours[key] for key, new in GGUF_TOKENIZER_MAPPING["tokenizer"].items() if key in ours}
    backend, _ = convert_gguf_tokenizer(architecture, described)
    if ours.get("ggml.pre") in DIGITS_APART:
        backend.pre_tokenizer = _digits_apart()
    ids = {token: ours[f"ggml.{key}_token_id"] for token, key in SPECIAL.items() if f"ggml.{key}_token_id" in ours}
    special = {token: described["tokens"][number] for token, number in ids.items()}
    if _adds_start(ours):
        special["add_bos_token"] = True
    elif not ours.get("chat_template"):
        special.pop("bos_token", None)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=ours.get("chat_template"), **special)


def _known_split(ours: Mapping[str, Any]) -> bool:
    """Whether it is known how text is split before byte-level merges; SentencePiece vocabularies need no such knowledge."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if ours.get("ggml.model") != "gpt2":
        return True
    return ours.get("ggml.pre") in {*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_SPLITS, *DIGITS_APART}


def _merges_hold(ours: Mapping[str, Any]) -> bool:
    """Whether every merge joins two tokens into a third: the tokenizers library ends with a panic where one does not."""
    tokens, merges = ours["ggml.tokens"], ours.get("ggml.merges", [])
    if not isinstance(tokens, list) or not isinstance(merges, list):
        return False
    known, pairs = set(tokens), [str(merge).split(" ") for merge in merges]
    return all(len(pair) == 2 and {*pair, "".join(pair)} <= known for pair in pairs)


def _adds_start(ours: Mapping[str, Any]) -> bool:
    """Whether the begin-of-sequence token is put before every text: llama.cpp's default depends on the kind of vocabulary."""
    return bool(ours.get("ggml.add_bos_token", ours.get("ggml.model") == "llama")) and "ggml.bos_token_id" in ours


def _digits_apart() -> Any:
    from tokenizers import pre_tokenizers

    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(parts)
