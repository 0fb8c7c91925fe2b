"""Token ids of every command against the whole conversation, rendered and tokenised once by transformers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.job import make_job
from jaxmed.effects.outcomes import encode_answers
from jaxmed.effects.request import Request
from jaxmed.tokens import answer_ids, encode_example, locate, render, written_text
from tests.tokenizers_of_families import KINDS, TEMPLATES, tokenizer

EXAMPLES = (
    jm.Example("hi there", "Sure, here is how."),
    jm.Example("Who is it?", "It is the assistant.", system="Name a colour."),
    jm.Example("assistant", "Blue.\n\nNo, I am sorry."),
)
TABLE = list(product(KINDS, TEMPLATES))


def whole(fast: Any, example: jm.Example) -> list[int]:
    """The ids of a conversation as transformers renders it, with begin-of-sequence once."""
    system = [] if example.system is None else [{"role": "system", "content": example.system}]
    chat = [*system, {"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.prefill + example.response}]
    ids = fast.apply_chat_template(chat, tokenize=True, return_dict=False)
    return ids if ids[:1] == [fast.bos_token_id] else [fast.bos_token_id, *ids]


@pytest.mark.parametrize(("kind", "template"), TABLE)
def test_examples_have_the_ids_of_the_whole_conversation(kind: str, template: str) -> None:
    fast = tokenizer(kind, template)
    for example in EXAMPLES:
        expected, got = whole(fast, example), encode_example(fast, example)
        assert got.ids.tolist() == expected[: len(got.ids)]
        assert not fast.decode(expected[len(got.ids) :], skip_special_tokens=True).strip()  # a line's end after the turn
        asked = render(fast, example)
        if not got.seam:
            assert got.ids[: got.prompt].tolist() == asked.ids.tolist()


@pytest.mark.parametrize(("kind", "template"), TABLE)
def test_answers_have_the_ids_of_the_whole_conversation(kind: str, template: str) -> None:
    fast = tokenizer(kind, template)
    for word, other in (("Sure", "No"), ("Blue", "I"), ("It is", "Sure, here")):
        pair = jm.PromptPair("p", "hi there", "how are you?", (word,), (other,))
        for side, answer in product(("base", "source"), encode_answers(fast, pair, ("prefix-gap",)).ids):
            asked = render(fast, pair, side)
            found = [*asked.ids.tolist(), *answer]
            text = word if answer == encode_answers(fast, pair, ("prefix-gap",)).ids[0] else other
            assert found == whole(fast, jm.Example(getattr(pair, side), text))[: len(found)]


@pytest.mark.parametrize(("kind", "template"), TABLE)
def test_openings_are_given_where_the_whole_conversation_has_them(kind: str, template: str) -> None:
    fast = tokenizer(kind, template)
    example = jm.Example("hi there", " here is how.", prefill="Sure,")
    expected = whole(fast, example)
    asked, got = render(fast, example).ids.tolist(), encode_example(fast, example)
    assert asked == expected[: len(asked)]
    assert got.prompt == len(asked)
    assert got.ids.tolist() == expected[: len(got.ids)]


MESSAGES = ("Who is it?", "assistant", "s", "<|assistant|>\n", "hi [/INST] hi", "  hi  ", "\n\nhi", "Assistant:", "user\nuser")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE"])
def test_the_users_message_is_found_whatever_it_says(kind: str, template: str) -> None:
    fast = tokenizer(kind, template)
    for message in MESSAGES:
        prompt = render(fast, jm.PromptPair("p", message, "x", ("a",), ("b",)))
        shown = prompt.text[slice(*prompt.user)]
        assert shown.strip() == (message.replace("\n\n", "\n") if template == "Falcon" else message).strip()
        unlike = render(fast, jm.PromptPair("p", "Q" * len(message), "x", ("a",), ("b",)))
        assert unlike.text[: unlike.user[0]] == prompt.text[: prompt.user[0]]
        assert unlike.text[unlike.user[1] :] == prompt.text[prompt.user[1] :]
        assert locate(prompt, "user")[-1:] == locate(prompt, "user_last")
        assert prompt.offsets[locate(prompt, "user")[0]][0] <= prompt.user[0]
        assert prompt.offsets[locate(prompt, "user_last")[0]][1] >= prompt.user[1]


def test_only_a_template_that_writes_past_turns_otherwise_is_told_of() -> None:
    told = {
        (template, example.system is not None)
        for kind, template in TABLE
        for example in EXAMPLES
        if encode_example(tokenizer(kind, template), example).seam
    }
    assert told == {("Mistral v3", True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_of_the_template_and_one_of_the_answer_are_one(kind: str) -> None:
    for template in ("Llama 2", "Mistral v3", "DeepSeek", "Vicuna", "Falcon"):
        fast = tokenizer(kind, template)
        with_space, without = (
            encode_answers(fast, jm.PromptPair("p", "hi", "you", (text,), ("No",)), ("log-odds",)).ids[0] for text in (" Sure", "Sure")
        )
        assert with_space == without
        assert len(without) == 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "WordPiece"])
@pytest.mark.parametrize("form", ["text", "plain"])
def test_an_answer_with_its_space_is_one_token_in_plain_text(kind: str, form: str) -> None:
    pair = jm.PromptPair("p", "hi there", "how are you", (" Sure",), (" No",))
    found = encode_answers(tokenizer(kind, "ChatML"), pair, ("log-odds",), form).ids
    assert [tokenizer(kind, "ChatML").convert_ids_to_tokens(list(ids)) for ids in found] in ([["▁Sure"], ["▁No"]], [["ĠSure"], ["ĠNo"]])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_after_a_prompt_keeps_its_space(kind: str) -> None:
    fast = tokenizer(kind, "Llama 2")
    for form, prefill, text in (("text", "", " Sure, here"), ("chat", "Sure,", " here is how"), ("chat", "", "Sure, here")):
        asked = render(fast, jm.Example("hi there", prefill=prefill), form=form)
        shown = written_text(fast, asked, np.asarray(answer_ids(fast, asked, text)))
        assert shown == (text.lower() if kind == "WordPiece" else text)


CHANGED = {
    "upper case": "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content | upper) + '<|end|>' }}{% endfor %}",
    "trimmed": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.strip() + '<|end|>' }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.content + '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}",
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_message_that_the_template_changes_is_found(change: str) -> None:
    fast = tokenizer("byte-level BPE", CHANGED[change] + "{% if add_generation_prompt %}<|assistant|>user{% endif %}")
    prompt = render(fast, jm.PromptPair("p", " user hi ", "x", ("a",), ("b",)))
    expected = {"upper case": " USER HI ", "trimmed": "user hi", "twice": " user hi "}[change]
    assert prompt.text[slice(*prompt.user)] == expected
    assert prompt.text[prompt.user[1] :] == "<|end|><|assistant|>user"
    shown = lambda position: fast.decode([prompt.ids[at] for at in locate(prompt, position)])  # noqa: E731
    assert shown("hi").strip().lower() == "hi"
    assert shown("user") == expected


@pytest.mark.parametrize(
    ("template", "chat", "said"),
    [
        ("{{ raise_exception('no system here') if messages[0].role == 'system' }}x", ["system", "user"], "no system here.*leave it out"),
        ("{{ raise_exception('take turns') if messages[1:] }}x", ["user", "user"], "take turns.*the user first"),
        ("{{ messages[0].content.nothing.more }}", ["user"], "refuses a chat of user.*--form text"),
        ("{{ messages[0].content }}", ["assistant"], "no user message"),
    ],
)
def test_a_template_that_refuses_a_chat_says_which(template: str, chat: list[str], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        render(tokenizer("byte-level BPE", template), [{"role": role, "content": "hi"} for role in chat])


@pytest.mark.parametrize(
    "message", [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "user"}, {"content": "hi"}, "hi"]
)
@pytest.mark.parametrize("form", ["chat", "plain"])
def test_messages_that_are_no_texts_are_refused(message: Any, form: str) -> None:
    with pytest.raises(jm.UserError, match="Give content as one text"):
        render(tokenizer("byte-level BPE", "ChatML"), [message], form=form)


THOUGHTS = {
    "an empty thought in past turns": "{% for m in messages %}{{ '<|' + m.role + '|>' + ('<t>\\n</t>\\n' if m.role == 'assistant' else '') "
    "+ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "a thought that is asked for": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</t>')[-1] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><t>\\n' }}{% endif %}",
}


@pytest.mark.parametrize("thought", THOUGHTS)
def test_templates_of_models_that_think(thought: str) -> None:
    fast = tokenizer("byte-level BPE", THOUGHTS[thought])
    for response in ("Sure, here is how.", "so</t>Sure."):
        got = encode_example(fast, jm.Example("hi there", response))
        assert got.ids.tolist() == whole(fast, jm.Example("hi there", response))
        assert bool(got.seam) == ("asked" in thought)
    answer = encode_answers(fast, jm.PromptPair("p", "hi", "you", ("Sure",), ("No",)), ("log-odds",)).ids[0]
    assert fast.decode(list(answer)) == "Sure"  # it follows what a model is asked with
    if "asked" in thought:
        assert fast.decode(got.ids[got.prompt :]) == "Sure.<|end|>"


def test_where_answers_stand_in_whole_conversations_is_told(plain_model: jm.Model) -> None:
    pair = jm.PromptPair("p", "hi", "you", ("Sure",), ("No",))
    model = replace(plain_model, config=replace(plain_model.config, vocabulary=420))

    def told(thought: str, pair: jm.PromptPair = pair) -> list[str]:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            make_job(replace(model, tokenizer=tokenizer("byte-level BPE", THOUGHTS.get(thought, thought))), [pair], Request())
        return [str(one.message) for one in heard if "Outcomes are read" in str(one.message)]

    (said,) = told("an empty thought in past turns")
    assert "stand behind '<t>\\n</t>\\n'" in said
    assert "--prefill" in said
    (said,) = told("a thought that is asked for")
    assert "past turns another way" in said
    assert not told("an empty thought in past turns", replace(pair, base_prefill="<t>\n</t>\n", source_prefill="<t>\n</t>\n"))
    assert not told("ChatML")


def test_a_template_that_wants_contents_in_parts_gets_them() -> None:
    """In the manner of models that see pictures: a text alone would be left out in silence."""
    fast = tokenizer(
        "byte-level BPE",
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    prompt = render(fast, "hi there")
    assert prompt.text == "<|user|>hi there<|end|><|assistant|>"
    assert prompt.text[slice(*prompt.user)] == "hi there"
    got = encode_example(fast, jm.Example("hi there", "Sure, here.", system="Name a colour."))
    assert fast.decode(got.ids[1:]) == "<|system|>Name a colour.<|end|><|user|>hi there<|end|><|assistant|>Sure, here.<|end|>"


def test_a_template_that_says_a_date_keeps_it() -> None:
    constant = (
        "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}|{{ messages[0].content }}"
    )
    assert render(tokenizer("byte-level BPE", constant), "hi").text == "26 Jul 2024|hi"


@pytest.mark.parametrize(
    ("template", "header"), [("Llama 2", " [/INST]"), ("ChatML", "<|im_start|>assistant\n"), ("DeepSeek", "Assistant:")]
)
def test_the_header_is_what_follows_the_users_turn(template: str, header: str) -> None:
    fast = tokenizer("byte-level BPE", template)
    prompt = render(fast, "hi [/INST] Assistant:")
    assert fast.decode([prompt.ids[at] for at in locate(prompt, "header")]) == header
    opened = render(fast, jm.Example("hi", prefill="Sure, here"))
    assert fast.decode([opened.ids[at] for at in locate(opened, "header")]).endswith("Sure, here")


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %B %Y') }}",
        "{% set form = '%d %B' + ' %Y' %}{{ strftime_now(form) }}",
        "{% set today = strftime_now %}{{ today('%d %B %Y') }}",
        "{% macro day(form='%d') %}{{ strftime_now(form) }}{% endmacro %}{{ day() + ' ' + day('%B') + ' ' + day(form='%Y') }}",
        "{{ strftime_now(format='%d %B %Y') }}",
        "{{ date_string | replace('Jan', 'January') }}",
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %B %Y') %}{% endif %}{{ date_string }}",
        "  {% set now = namespace(of=strftime_now) %}{{ now.of('%d %B %Y') }}",
        "{{ {'day': strftime_now}['day']('%0d %B %Y') }}",
        "{% set day %}{{ strftime_now('%d') }}{% endset %}{{ day }} {{ strftime_now('%B') + ' ' + (strftime_now('%Y') | int) | string }}",
    ],
)
def test_dates_are_fixed_in_every_form(template: str) -> None:
    for held in (template + "|{{ messages[0].content }}", "\n" + template + "|{{ messages[0].content }}"):
        text = render(tokenizer("byte-level BPE", held), "hi").text
        assert text == held[: held.startswith("\n")] + "01 January 2026|hi"


@pytest.mark.parametrize(
    ("form", "expected"), [("100%%|%%d|%%%d", "100%|%d|%01"), ("%-d.%-m. %^b", "1.1. JAN"), ("no day", "no day"), ("%", "%")]
)
def test_signs_of_percent_in_formats_of_dates(form: str, expected: str) -> None:
    template = "{% set now = strftime_now %}{{ now('" + form + "') }}|{{ messages[0].content }}"
    assert render(tokenizer("byte-level BPE", template), "hi").text == expected + "|hi"


REACTS = (
    "{% for m in messages %}{% if m.content.startswith('<r>') and m.content.endswith('</r>') %}{{ '<|system|>' + m.content }}{% else %}"
    "{{ '<|' + m.role + '|>' + m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("chat", [["<r>a</r>"], ["<r>a</r>", "<r>a</r>", "<r>a</r>"], ["hi", "x", " <r>r</r>"], ["<r></r>"]])
def test_a_message_that_the_template_reacts_to_is_found(chat: list[str]) -> None:
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, chat, strict=False)]
    prompt = render(tokenizer("byte-level BPE", REACTS), messages)
    assert prompt.text[slice(*prompt.user)].strip() == chat[-1].strip()
    assert prompt.text[prompt.user[1] :] == "<|end|><|assistant|>"


def test_a_message_that_the_template_takes_out_is_refused() -> None:
    fast = tokenizer("byte-level BPE", "{{ messages[0].content.replace('/quiet', '') }}{{ '<|end|>' if '/quiet' in messages[0].content }}x")
    with pytest.raises(jm.UserError, match="verbatim"):
        render(fast, "/quiet")


def test_named_templates_are_fixed_too() -> None:
    fast = tokenizer("byte-level BPE", "")
    fast.chat_template = {"default": "{{ strftime_now('%Y') }}|{{ messages[0].content }}", "tool_use": "x"}
    assert render(fast, "hi").text == "2026|hi"
    fast.chat_template = {"rag": "x"}
    with pytest.raises(jm.UserError, match="none named default"):
        render(fast, "hi")
