"""The tokenizer that a GGUF file's metadata describes, by transformers' own converter (private there: pinned, and its ids are tested)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

GPT2_SPLITS = ("gpt-2", "mpt", "olmo", "jais", "trillion")
"""Pre-tokenizers that split text as GPT-2's does."""
DIGITS_APART = ("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b")
"""Pre-tokenizers that take every digit out first, and split the rest as GPT-2's does."""
SPACE = "\u2581"
"""How SentencePiece spells a space."""
MARKED = (2, 3, 4)
"""Types of tokens that llama.cpp finds in texts whole: unknown, control, user-defined."""
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
    if ours.get("ggml.model") == "llama":
        backend = _as_sentencepiece(_with_own_tokens(backend, ours), bool(ours.get("ggml.add_space_prefix", "gemma" not in architecture)))
    ids = {token: ours[f"ggml.{key}_token_id"] for token, key in SPECIAL.items() if f"ggml.{key}_token_id" in ours}
    special = {token: described["tokens"][number] for token, number in ids.items()}
    if _adds_start(ours):
        special["add_bos_token"] = True
    if ours.get("ggml.add_eos_token") and "eos_token" in special:
        special["add_eos_token"] = True
    if "add_bos_token" not in special and not ours.get("chat_template"):
        special.pop("bos_token", None)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=ours.get("chat_template"), **special)


def _as_sentencepiece(backend: Any, prefix: bool) -> Any:
    """The tokenizer with spaces as llama.cpp has them: with `prefix`, one before the text and before what follows a special token."""
    from tokenizers import decoders, normalizers

    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    backend.pre_tokenizer = None
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return backend


def _with_own_tokens(backend: Any, ours: Mapping[str, Any]) -> Any:
    """The tokenizer without the special tokens that the converter's classes bring along and the file does not mark as such."""
    from tokenizers import Tokenizer

    tokens, kinds = ours["ggml.tokens"], ours.get("ggml.token_type") or []
    marked = {token for token, kind in zip(tokens, kinds, strict=False) if kind in MARKED} if kinds else set(tokens)
    marked |= {SPACE * len(token) for token in marked if token.isspace()}  # as the converter spells runs of spaces
    if all(token.content in marked for token in backend.get_added_tokens_decoder().values()):
        return backend
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in marked]
    return Tokenizer.from_str(json.dumps(described))


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
