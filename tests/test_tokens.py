"""Token ids, positions, alignment and packing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.texts import encode
from jaxmed.cli.main import COMMANDS, main
from jaxmed.cli.parser import parse
from jaxmed.effects.outcomes import encode_answers
from jaxmed.errors import Notice
from jaxmed.tokens import BUCKETS, align, bucket, encode_example, has_text, locate, pack, render
from tests import tiny
from tests.tokenizers_of_families import tokenizer


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


@pytest.mark.parametrize("position", ["--5", "- 5", "5-", "+-5", ""])
def test_what_is_no_number_is_refused_as_a_position(smol, position: str) -> None:
    prompt = render(smol, tiny.PAIRS[0], "base")
    assert locate(prompt, "-5") == locate(prompt, -5) == [len(prompt.ids) - 5]
    with pytest.raises(jm.UserError, match="Unknown position"):
        locate(prompt, position)


def test_a_substring_is_looked_for_in_the_message_first(smol) -> None:
    prompt = render(smol, jm.PromptPair("p", "who is an assistant", "x", ("a",), ("b",)), "base")
    assert locate(prompt, "assistant") == locate(prompt, "user_last")
    assert locate(prompt, "SmolLM")[0] < locate(prompt, "user")[0]


FED = {
    "text": ("<s>hi", " Sure"),
    "plain": ("hi\n", "Sure"),
    "space": ("hi", " Sure"),
    "qa": ("Q: hi\nA:", " Sure"),
}


@pytest.mark.parametrize("form", FED)
def test_every_command_feeds_a_form_alike(form: str) -> None:
    fast = tokenizer("byte-level BPE", "ChatML")
    prompt, answer = FED[form]
    given = " Sure" if form == "text" else "Sure"
    example, pair = jm.Example("hi", given), jm.PromptPair("p", "hi", "hi", (given,), ("No",))
    trained = encode_example(fast, example, form)
    fed = [render(fast, asked, form=form).ids.tolist() for asked in (pair, example, "hi")] + [trained.ids[: trained.prompt].tolist()]
    assert [fast.decode(ids) for ids in fed] == 4 * [prompt]
    assert fast.decode(trained.ids[trained.prompt :]) == answer
    assert fast.decode(encode_answers(fast, pair, ("prefix-gap",), form).ids[0]) == answer
    with pytest.raises(jm.UserError, match="use --form chat"):
        render(
            fast, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "hi"}], form=form
        )


@pytest.mark.parametrize(
    ("pair", "form", "said"),
    [
        (jm.PromptPair("p", "hi ", "hi", ("Sure",), ("No",)), "text", r"alone it ends in ' ' \(ids \d+\), and with the text in ' Sure'"),
        (jm.PromptPair("p", "hi", "hi ", ("Sure",), ("No",)), "text", r"spaces and newlines at the seam are joined"),
        (jm.PromptPair("p", "hi", "hi", ("Sure",), ("No",), base_prefill="I "), "chat", r"'Sure' cannot follow this prompt"),
    ],
)
def test_a_seam_that_merges_is_told_of_with_its_tokens(pair: jm.PromptPair, form: str, said: str) -> None:
    fast = tokenizer("byte-level BPE", "ChatML")
    with pytest.raises(jm.UserError, match=said):
        encode_answers(fast, pair, ("prefix-gap",), form)


def test_an_answer_with_other_tokens_after_base_than_after_source_is_refused() -> None:
    fast = tokenizer("SentencePiece BPE", "Llama 2")
    pair = jm.PromptPair("p", "hi", "hi", ("Sure",), ("No",), base_prefill="hi")
    with pytest.raises(jm.UserError, match=r"'Sure' is .* after base and ' Sure' \(\d+,\) after source"):
        encode_answers(fast, pair, ("prefix-gap",))
    assert encode_answers(fast, replace(pair, target=(" Sure",), foil=(" No",)), ("prefix-gap",)).ids


def test_a_response_that_merges_with_its_prompt_belongs_to_the_response() -> None:
    fast = tokenizer("byte-level BPE", "ChatML")
    with pytest.warns(Notice, match="1 of 2 prompts have other tokens"):
        merged, apart = encode(fast, [jm.Example("hi ", "Sure"), jm.Example("hi", " Sure")], "text")
    assert merged.ids.tolist() == apart.ids.tolist()
    assert merged.prompt == apart.prompt


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
        (jm.PromptPair("p", "x", "y", ("Sure",), ()), "log-odds", "takes at least 1 foil"),
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


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE"])
def test_stop_texts_are_seen_with_their_spaces_and_in_many_tokens(kind: str) -> None:
    fast = tokenizer(kind, "ChatML")
    last, *written = fast("Sure hi there, how", add_special_tokens=False)["input_ids"]
    for text, seen in ((" hi", True), (" there", True), ("hi there, how", True), ("Sure hi", False), ("hi  there", False)):
        assert has_text(fast, last, written, [text, "never"]) == seen
    emoji = tokenizer("byte-level BPE", "ChatML")("a\U0001f642", add_special_tokens=False)["input_ids"]
    assert len(emoji) > 3
    assert has_text(tokenizer("byte-level BPE", "ChatML"), emoji[0], emoji[1:], ["\U0001f642"])


@pytest.mark.parametrize(("position", "code"), [("=-5", None), ("=--5", 2)])
def test_positions_of_the_command_line(position: str, code: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", "--pairs", "harm", "--limit", "1", "--unit", "mlp_out", "--position" + position, "--out", str(tmp_path / "o")]
    if code is None:
        assert parse(arguments, COMMANDS, {}).position == "-5"
    else:
        assert main(arguments) == code
        assert "Unknown position '--5'" in capsys.readouterr().err
