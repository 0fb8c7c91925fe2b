"""Vocabularies of GGUF files, read as llama.cpp reads them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import pre_tokenizers

from jaxmed.models.checkpoints.gguf_header import read_header
from jaxmed.models.checkpoints.gguf_tokenizer import build_tokenizer
from tests.published_templates import VOCABULARIES, published_ids

WORDS = ("hi", "▁hi", "▁[", "IN", "INS", "INST", "▁t", "▁th", "th", "▁▁")
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁[]<>/abehirstINSTu", *WORDS, "<x>"]


def tokenizer(architecture: str = "llama", kinds: dict[str, int] | None = None, name: str = "", **said: Any) -> Any:
    """The tokenizer of a small vocabulary; `kinds`: types of tokens that are not the usual ones."""
    pieces = list(dict.fromkeys(PIECES))
    usual = {"<unk>": 2, "<s>": 3, "</s>": 3, **{piece: 6 for piece in pieces if piece.startswith("<0x")}, **(kinds or {})}
    types = [usual.get(piece, 1) for piece in pieces]
    metadata: dict[str, Any] = {
        "ggml.model": "llama",
        "ggml.tokens": pieces,
        "ggml.scores": [10.0 * len(piece) - 1000 if kind == 1 else 0.0 for piece, kind in zip(pieces, types, strict=True)],
        "ggml.token_type": types,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        **{f"ggml.{key}": value for key, value in said.items()},
    }
    return build_tokenizer({"general.name": name, **{f"tokenizer.{key}": value for key, value in metadata.items()}}, architecture)


def split(fast: Any, text: str, **how: Any) -> list[str]:
    """The pieces of a text."""
    return fast.convert_ids_to_tokens(fast(text, **how)["input_ids"])


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        (True, "hi", ["▁hi"]),
        (True, " hi", ["▁", "▁hi"]),
        (True, "</s>hi", ["</s>", "▁hi"]),
        (True, "<s>[INST] hi", ["<s>", "▁[", "INST", "]", "▁hi"]),
        (True, "hi</s> hi", ["▁hi", "</s>", "▁", "▁hi"]),
        (False, "hi", ["hi"]),
        (False, " hi", ["▁hi"]),
        (False, "</s>hi", ["</s>", "hi"]),
        (False, "<s>[INST] hi", ["<s>", "[", "INST", "]", "▁hi"]),
    ],
)
def test_a_space_before_the_text_and_after_special_tokens(architecture: str, prefix: bool, text: str, expected: list[str]) -> None:
    fast = tokenizer(architecture, add_space_prefix=prefix)
    assert split(fast, text, add_special_tokens=False) == expected
    plain = text.replace("</s>", "").replace("<s>", "")
    if "<" not in text:
        assert fast.decode(fast(plain, add_special_tokens=False)["input_ids"]) == plain


def test_the_prefix_is_the_default_but_for_gemma() -> None:
    assert split(tokenizer(), "hi") == ["<s>", "▁hi"]
    assert split(tokenizer("gemma2"), "hi") == ["<s>", "hi"]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(True, True, ["<s>", "▁hi", "</s>"]), (True, False, ["<s>", "▁hi"]), (False, True, ["▁hi", "</s>"]), (False, False, ["▁hi"])],
)
def test_start_and_end_tokens(start: bool, end: bool, expected: list[str]) -> None:
    assert split(tokenizer(add_bos_token=start, add_eos_token=end), "hi") == expected


@pytest.mark.parametrize(("kind", "expected"), [(1, ["▁", "<", "/", "s", ">"]), (3, ["</s>"]), (4, ["</s>"])])
def test_a_literal_is_a_token_of_its_own_only_where_it_is_marked(kind: int, expected: list[str]) -> None:
    fast = tokenizer(kinds={"</s>": kind, "<x>": 3}, eos_token_id=len(dict.fromkeys(PIECES)) - 1)
    assert split(fast, "</s>", add_special_tokens=False) == expected
    assert split(fast, "<x>", add_special_tokens=False) == ["<x>"]


@pytest.mark.parametrize("number", [-1, 2**32 - 1, 10**6, None])
def test_special_ids_outside_the_vocabulary_are_none(number: int | None) -> None:
    fast = tokenizer(padding_token_id=number, bos_token_id=number, eos_token_id=number, kinds={"<x>": 3})
    assert fast.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # the usual ones
    assert split(fast, "hi<x>") == ["<s>", "▁hi", "<x>"]
    assert split(byte_level("llama-bpe", bos_token_id=number), "hi") == ["hi"]


def test_nothing_is_added_to_the_vocabulary() -> None:
    assert len(tokenizer("gemma2")) == len(dict.fromkeys(PIECES))  # its class brings <bos>, <eos>, <pad> and <mask> along


@pytest.mark.parametrize(("text", "expected"), [("é", ["<0xC3>", "<0xA9>"]), ("🦊", ["<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>"])])
def test_unknown_letters_fall_back_to_bytes(text: str, expected: list[str]) -> None:
    fast = tokenizer(add_space_prefix=False)
    assert split(fast, text, add_special_tokens=False) == expected
    assert fast.decode(fast(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("name", "expected"), [("Phi3", ["</s>", "▁hi"]), ("Phi 3.5 mini", ["</s>", "▁hi"]), ("Tiny", ["</s>", "▁", "<0x0A>", "hi"])]
)
def test_control_tokens_of_phi3_take_the_newline_along(name: str, expected: list[str]) -> None:
    assert split(tokenizer("phi3", name=name), "</s>\nhi", add_special_tokens=False) == expected


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ("Ġ h", "Ġh i", "h i", "Ġ Ġ", "1 2", "12 3", "4 5", "45 6", "Ċ Ċ")
OWN = {"<|bos|>": 3, "<\uff5cUser\uff5c>": 3, "<think>": 4, "  ": 4, "<|im_end|>": 1}


def byte_level(pre: str | None = "gpt-2", **said: Any) -> Any:
    """The tokenizer of a small byte-level vocabulary whose word "hihi" no merge makes."""
    tokens = [*ALPHABET, *("".join(merge.split()) for merge in MERGES), "hihi", *OWN]
    metadata: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.tokens": tokens,
        "ggml.merges": list(MERGES),
        "ggml.token_type": [OWN.get(token, 1) for token in tokens],
        "ggml.bos_token_id": tokens.index("<|bos|>"),
        **({} if pre is None else {"ggml.pre": pre}),
        **{f"ggml.{key}": value for key, value in said.items()},
    }
    return build_tokenizer({f"tokenizer.{key}": value for key, value in metadata.items()}, "llama")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<\uff5cUser\uff5c>hi", ["<\uff5cUser\uff5c>", "hi"]),
        ("<think>hi<|im_end|>", ["<think>", "hi", "<|im_end|>"]),
        ("hi  hi", ["hi", "  ", "hi"]),
        ("hi   hi", ["hi", "  ", "Ġhi"]),
        ("é", ["Ã", "©"]),
    ],
)
def test_tokens_of_a_byte_level_vocabulary_that_are_found_whole(text: str, expected: list[str]) -> None:
    fast = byte_level()
    assert split(fast, text, add_special_tokens=False) == expected
    assert fast.decode(fast(text, add_special_tokens=False)["input_ids"]) == text
    assert len(fast) == len(ALPHABET) + len(MERGES) + 1 + len(OWN)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "hi123456", ["hi", "123", "456"]),
        ("qwen2", "hi12", ["hi", "1", "2"]),
        ("llama-bpe", "hihi 123456", ["<|bos|>", "hihi", "Ġ", "123", "456"]),
        ("tekken", "hihi 12", ["<|bos|>", "hihi", "Ġ", "1", "2"]),
        ("dbrx", "hihi\n\n12", ["hi", "hi", "ĊĊ", "12"]),
        ("smollm", "hihi12", ["hi", "hi", "1", "2"]),
        ("deepseek-llm", "hi\n\n123", ["hi", "Ċ", "Ċ", "123"]),
        ("deepseek-coder", "hi 12", ["hi", "Ġ", "1", "2"]),
        ("deepseek-v3", "hi123456", ["hi", "123", "456"]),
        ("falcon", "123456", ["123", "456"]),
        ("default", "hi123456", ["hi", "123", "456"]),
        (None, "hi hi", ["hi", "Ġhi"]),
    ],
)
def test_pre_tokenizers(pre: str | None, text: str, expected: list[str]) -> None:
    assert split(byte_level(pre), text) == expected


def test_a_pre_tokenizer_that_nobody_knows_makes_no_tokenizer() -> None:
    assert byte_level("of-tomorrow") is None
    assert split(byte_level("llama-bpe", add_bos_token=False), "hi") == ["hi"]


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
def test_published_vocabularies_give_the_ids_of_llama_cpp(name: str) -> None:
    file, cases = published_ids(name)
    metadata = read_header(file).metadata
    fast = build_tokenizer(metadata, metadata["general.architecture"])
    assert [fast(text, add_special_tokens=False)["input_ids"] for text, _ in cases] == [ids for _, ids in cases]
    assert len(fast) == len(metadata["tokenizer.ggml.tokens"])
