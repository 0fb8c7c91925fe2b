"""SentencePiece vocabularies of GGUF files, read as llama.cpp reads them."""

from __future__ import annotations

from typing import Any

import pytest

from jaxmed.models.checkpoints.gguf_tokenizer import build_tokenizer

WORDS = ("hi", "▁hi", "▁[", "IN", "INS", "INST", "▁t", "▁th", "th", "▁▁")
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁[]<>/abehirstINSTu", *WORDS, "<x>"]


def tokenizer(architecture: str = "llama", kinds: dict[str, int] | None = None, **said: Any) -> Any:
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
    return build_tokenizer({f"tokenizer.{key}": value for key, value in metadata.items()}, architecture)


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


def test_nothing_is_added_to_the_vocabulary() -> None:
    assert len(tokenizer("gemma2")) == len(dict.fromkeys(PIECES))  # its class brings <bos>, <eos>, <pad> and <mask> along


@pytest.mark.parametrize(("text", "expected"), [("é", ["<0xC3>", "<0xA9>"]), ("🦊", ["<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>"])])
def test_unknown_letters_fall_back_to_bytes(text: str, expected: list[str]) -> None:
    fast = tokenizer(add_space_prefix=False)
    assert split(fast, text, add_special_tokens=False) == expected
    assert fast.decode(fast(text, add_special_tokens=False)["input_ids"]) == text
