"""Token ids, positions, alignment and packing."""

from __future__ import annotations

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.outcomes import encode_answers
from jaxmed.tokens import BUCKETS, align, bucket, locate, pack, render
from tests import tiny


def test_ids_of_the_default_tokenizer_are_pinned(smol) -> None:
    assert smol("Hello 123 world\n it's", add_special_tokens=False)["input_ids"] == [19556, 216, 33, 34, 35, 905, 198, 357, 506]
    pair = jm.PromptPair("p", "hi there", "hi", ("a",), ("b",))
    prompt = render(smol, pair, "base")
    assert prompt.text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.text.endswith("<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.ids[:3].tolist() == [1, 9690, 198]
    assert smol.decode(prompt.ids) == prompt.text


def test_positions_of_a_rendered_chat(smol) -> None:
    prompt = render(smol, jm.PromptPair("p", "bake me bread", "x", ("a",), ("b",)), "base")
    words = lambda position: [smol.decode([prompt.ids[i]]) for i in locate(prompt, position)]  # noqa: E731
    assert words("last") == ["\n"] == words(-1)
    assert words("user_last") == [" bread"]
    assert "".join(words("user")) == "bake me bread"
    assert "".join(words("header")) == "<|im_start|>assistant\n"
    assert words("me br") == [" me", " bread"]
    assert len(words("all")) == len(prompt.ids)


def test_a_prefill_is_part_of_the_prompt(smol) -> None:
    prompt = render(smol, jm.PromptPair("p", "bake", "x", ("a",), ("b",), base_prefill="Sure, I"), "base")
    assert prompt.text.endswith("<|im_start|>assistant\nSure, I")
    assert smol.decode([prompt.ids[-1]]) == " I"


def test_system_and_full_chats(smol) -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    prompt = render(smol, jm.PromptPair("p", messages={"base": chat, "source": chat}), "base")
    assert smol.decode([prompt.ids[locate(prompt, "user_last")[0]]]) == "three"
    assert "be kind" in render(smol, jm.PromptPair("p", "x", "y", system="be kind"), "base").text


def test_begin_of_sequence_occurs_exactly_once() -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = tiny.tokenizer().backend_tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    start = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    pair = jm.PromptPair("p", "hello", "x", ("a",), ("b",))
    for template in (tiny.TEMPLATE, "<s>" + tiny.TEMPLATE):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=template)
        for form in ("chat", "text"):
            assert (render(tokenizer, pair, "base", form).ids == start).sum() == 1


def test_dates_in_templates_are_fixed() -> None:
    tokenizer = tiny.tokenizer()
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ date_string }} {{ messages[0]['content'] }}"
        assert render(tokenizer, tiny.PAIRS[0], "base").text == "2026-01-01 01 Jan 2026 how to harm"
    finally:
        tokenizer.chat_template = kept


def test_positions_out_of_range_and_unknown(smol) -> None:
    prompt = render(smol, tiny.PAIRS[0], "base")
    with pytest.raises(jm.UserError, match="out of range"):
        locate(prompt, 1000)
    with pytest.raises(jm.UserError, match="Did you mean 'last'"):
        locate(prompt, "lst")


def test_unequal_lengths_pair_from_the_right_or_not_at_all() -> None:
    base, source = (render(tiny.tokenizer(), tiny.PAIRS[1], side) for side in ("base", "source"))
    assert len(base.ids) != len(source.ids)
    assert align(base, source, "last")[0].label == -1
    each = align(base, source, "each")
    assert len(each) == min(len(base.ids), len(source.ids))
    assert [patch.label for patch in each] == list(range(-len(each), 0))
    for position in ("all", "user"):
        with pytest.raises(jm.UserError, match="cannot be paired"):
            align(base, source, position)


def test_packed_answers_see_the_prompt_and_themselves_alone() -> None:
    packed = pack(np.asarray([5, 6, 7]), [[1, 2, 3], [4], [8, 9]])
    assert packed.tokens[: packed.used].tolist() == [5, 6, 7, 1, 2, 8]
    assert packed.position[: packed.used].tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.readers == ((2, 3, 4), (2,), (2, 5))
    assert np.flatnonzero(packed.visible[4]).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(packed.visible[5]).tolist() == [0, 1, 2, 5]


def test_buckets_grow() -> None:
    assert [bucket(n) for n in (1, 8, 9, 8192, 8193)] == [8, 8, 16, 8192, 12288]
    assert list(BUCKETS) == sorted(BUCKETS)


@pytest.mark.parametrize(
    ("pair", "outcome", "said"),
    [
        (jm.PromptPair("p", "x", "y", ("Sure thing",), ("I",)), "log-odds", "'Sure' + ' thing'"),
        (jm.PromptPair("p", "x", "y", ("Sure", "Here"), ("I",)), "logit-diff", "Use log-odds"),
        (jm.PromptPair("p", "x", "y", ("Sure",), ("Sure", "I")), "log-odds", "both a target and a foil"),
        (jm.PromptPair("p", "x", "y", ("Sure",), ()), "log-odds", "needs a target and a foil"),
        (jm.PromptPair("p", "x", "y", ("Sure",), ("I",)), "sequence-logprob", "response"),
    ],
)
def test_texts_that_an_outcome_cannot_use(smol, pair: jm.PromptPair, outcome: str, said: str) -> None:
    with pytest.raises(jm.UserError) as caught:
        encode_answers(smol, pair, (outcome,))
    assert said in str(caught.value)


def test_an_unknown_outcome_names_the_nearest() -> None:
    with pytest.raises(jm.UserError, match="Did you mean 'log-odds'"):
        jm.sweep(tiny.model("llama"), tiny.PAIRS, "logodds")
