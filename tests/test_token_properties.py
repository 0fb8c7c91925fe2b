"""Properties of positions, alignment and packing, for any text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jaxmed as jm
from jaxmed.tokens import align, answer_ids, bucket, encode_example, locate, pack, pad, render
from tests.tokenizers_of_families import KINDS, TEMPLATES, tokenizer

TEXTS = st.text(st.sampled_from("aSurehi NoABI:.\n<|>[]/\u00e9\u6f22\U0001f642\u2028"), min_size=1, max_size=30)
FAST = st.builds(
    tokenizer,
    st.sampled_from([kind for kind in KINDS if kind != "WordPiece"]),
    st.sampled_from([name for name in TEMPLATES if name != "Falcon"]),
)  # it changes newlines
IDS = st.lists(st.integers(0, 99), min_size=1, max_size=20)


@given(FAST, TEXTS, st.sampled_from(["chat", "text", "plain", "space", "qa"]))
@settings(max_examples=150, deadline=None)
def test_the_users_tokens_are_the_fewest_that_cover_the_message(fast: object, text: str, form: str) -> None:
    prompt = render(fast, text, form=form)
    assert len(prompt.offsets) == len(prompt.ids)
    begin, end = prompt.user
    assume(begin < end)
    found = locate(prompt, "user")
    inside = [at for at, (a, b) in enumerate(prompt.offsets) if a < end and b > begin]
    assert found == list(range(inside[0], inside[-1] + 1))
    assert prompt.text[begin:end].strip() == text.strip()


@given(FAST, TEXTS, st.data())
@settings(max_examples=100, deadline=None)
def test_indices_name_one_token_from_either_end(fast: object, text: str, data: st.DataObject) -> None:
    prompt = render(fast, text)
    count = len(prompt.ids)
    at = data.draw(st.integers(-count, count - 1))
    assert locate(prompt, at) == locate(prompt, str(at)) == [at % count]
    assert locate(prompt, at) == locate(prompt, at % count - count)
    assert locate(prompt, "all") == list(range(count))
    assert locate(prompt, "last") == [count - 1]


@given(FAST, TEXTS, TEXTS)
@settings(max_examples=100, deadline=None)
def test_alignments_pair_from_the_right(fast: object, one: str, other: str) -> None:
    base, source = render(fast, one), render(fast, other)
    each = align(base, source, "each")
    assert [patch.label for patch in each] == list(range(-min(len(base.ids), len(source.ids)), 0))
    for patch in each:
        assert patch.base[0] - len(base.ids) == patch.source[0] - len(source.ids) == patch.label
    turned = align(source, base, "each")
    assert [(patch.source, patch.base) for patch in turned] == [(patch.base, patch.source) for patch in each]


@given(FAST, TEXTS, TEXTS)
@settings(max_examples=150, deadline=None)
def test_a_prompt_and_what_follows_it_are_the_whole_text(fast: object, asked: str, answer: str) -> None:
    prompt = render(fast, asked, form="text")
    whole = render(fast, asked + answer, form="text").ids
    if whole[: len(prompt.ids)].tolist() != prompt.ids.tolist():
        with pytest.raises(jm.UserError, match="cannot follow this prompt"):
            answer_ids(fast, prompt, answer)
        assert encode_example(fast, jm.Example(asked, answer), "text").seam
        return
    found = answer_ids(fast, prompt, answer)
    assert [*prompt.ids, *found] == whole.tolist()
    if found:
        example = encode_example(fast, jm.Example(asked, answer), "text")
        assert example.ids.tolist() == whole.tolist()
        assert example.prompt == len(prompt.ids)


@given(IDS, st.lists(IDS, max_size=6))
def test_packed_rows_give_back_prompt_and_answers(prompt: list[int], answers: list[list[int]]) -> None:
    packed = pack(np.asarray(prompt), answers)
    assert len(packed.tokens) == bucket(packed.used)
    assert packed.tokens[: packed.prompt].tolist() == prompt
    for answer, readers in zip(answers, packed.readers, strict=True):
        assert packed.tokens[list(readers[1:])].tolist() == answer[:-1]
        assert packed.position[list(readers)].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(answer)))
        for number, column in enumerate(readers):
            assert np.flatnonzero(packed.visible[column]).tolist() == [*range(packed.prompt), *readers[1 : number + 1]]


@given(st.lists(IDS, min_size=1, max_size=6), st.integers(0, 9))
def test_padded_rows_give_back_their_prompts(prompts: list[list[int]], more: int) -> None:
    ids, padding = pad([np.asarray(prompt) for prompt in prompts], max(map(len, prompts)) + more)
    assert [row[left:].tolist() for row, left in zip(ids, padding, strict=True)] == prompts
    assert not ids[np.arange(ids.shape[1]) < padding[:, None]].any()
