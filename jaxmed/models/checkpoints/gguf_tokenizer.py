"""The tokenizer that a GGUF file's metadata describes, as llama.cpp reads it.

Byte-level vocabularies are built here; others by transformers' own converter (private there: pinned, and its ids are tested).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from jaxmed.models.checkpoints.gguf_splits import STARTED, WHOLE_WORDS, find_split

SPACE = "\u2581"
"""How SentencePiece spells a space."""
UNKNOWN, CONTROL, OWN = 2, 3, 4
MARKED = (UNKNOWN, CONTROL, OWN)
"""Types of tokens that llama.cpp finds in texts whole: unknown, control, user-defined."""
TURNS_END = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "<|eom_id|>")
"""Control tokens whatever type a file says; "</s>" is none of them: some vocabularies have it as a tag of HTML."""
_PHI3, SPACED = re.compile("phi[- ]?3", re.IGNORECASE), ("<unk>", "<s>", "<|endoftext|>")
"""Names of models whose control tokens take the spaces and newlines behind them along, but for these."""
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
USUAL = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids in SentencePiece vocabularies of files that name none."""


def build_tokenizer(metadata: Mapping[str, Any], architecture: str) -> Any:
    """A transformers tokenizer; None where the metadata describes none, or one of a kind that is not understood."""
    ours = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
    if not ours.get("ggml.tokens") or not _merges_hold(ours) or (ours.get("ggml.model") == "gpt2" and not find_split(ours.get("ggml.pre"))):
        return None
    ours["ggml.token_type"] = _kinds(ours)
    try:
        return _convert(ours, architecture, str(metadata.get("general.name", "")))
    except Exception:  # the converter, and the library under it, raise many types on vocabularies that do not hold together
        return None


def _kinds(ours: Mapping[str, Any]) -> list[int]:
    """The type of every token."""
    tokens, kinds = ours["ggml.tokens"], ours.get("ggml.token_type") or []
    return [CONTROL if token in TURNS_END else kind for token, kind in zip_longest(tokens, kinds[: len(tokens)], fillvalue=1)]


def _convert(ours: Mapping[str, Any], architecture: str, name: str) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    described = {new: ours[key] for key, new in GGUF_TOKENIZER_MAPPING["tokenizer"].items() if key in ours}
    backend = _byte_level(ours) if ours.get("ggml.model") == "gpt2" else convert_gguf_tokenizer(architecture, described)[0]
    if ours.get("ggml.model") == "llama":
        backend = _as_sentencepiece(_with_own_tokens(backend, ours), bool(ours.get("ggml.add_space_prefix", "gemma" not in architecture)))
        backend = _with_bare_tokens(backend) if _PHI3.search(name) else backend
    special: dict[str, Any] = _special_tokens(ours)
    if "bos_token" in special and _adds_start(ours):
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


def _with_bare_tokens(backend: Any) -> Any:
    """The tokenizer whose control tokens take the spaces and newlines behind them along."""
    from tokenizers import Tokenizer

    described = json.loads(backend.to_str())
    for token in described["added_tokens"]:
        token["rstrip"] = token["content"] not in SPACED
    return Tokenizer.from_str(json.dumps(described))


def _byte_level(ours: Mapping[str, Any]) -> Any:
    """A byte-level vocabulary: tokens that are found whole are spelled as they stand in texts, others byte by byte."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds, name = ours["ggml.tokens"], ours["ggml.token_type"], ours.get("ggml.pre")
    merges = [tuple(merge.split(" ")) for merge in ours.get("ggml.merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in find_split(name) or ()]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    marked = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in MARKED and token]
    backend.add_tokens([AddedToken(token, special=kind != OWN, normalized=False) for token, kind in marked])
    return backend


def _merges_hold(ours: Mapping[str, Any]) -> bool:
    """Whether every merge joins two tokens into a third: the tokenizers library ends with a panic where one does not."""
    tokens, merges = ours["ggml.tokens"], ours.get("ggml.merges", [])
    if not isinstance(tokens, list) or not isinstance(merges, list):
        return False
    known, pairs = set(tokens), [str(merge).split(" ") for merge in merges]
    return all(len(pair) == 2 and {*pair, "".join(pair)} <= known for pair in pairs)


def _adds_start(ours: Mapping[str, Any]) -> bool:
    """Whether the begin-of-sequence token is put before every text: llama.cpp's default depends on the kind of vocabulary."""
    usual = ours.get("ggml.model") == "llama" or (ours.get("ggml.model") == "gpt2" and ours.get("ggml.pre") in STARTED)
    return bool(ours.get("ggml.add_bos_token", usual))


def _special_tokens(ours: Mapping[str, Any]) -> dict[str, str]:
    """Begin, end, unknown and padding; an id outside the vocabulary, such as -1, counts as none."""
    tokens, kinds, found = ours["ggml.tokens"], ours["ggml.token_type"], {}
    usual = USUAL if ours.get("ggml.model") == "llama" else {}
    for token, key in SPECIAL.items():
        number, other = ours.get(f"ggml.{key}_token_id"), usual.get(key, len(tokens))
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[token] = tokens[number]
        elif other < len(tokens) and kinds[other] in MARKED:
            found[token] = tokens[other]
    return found
