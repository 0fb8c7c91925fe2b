"""Token ids under the published chat templates of thirty-two models, with tokenizers of every kind, against transformers."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import pytest
import transformers.utils.chat_template_utils as chat_template_utils

import jaxmed as jm
from jaxmed.effects.outcomes import encode_answers
from jaxmed.tokens import DATE, encode_example, render
from tests.published_templates import BEHIND, published
from tests.test_templates import EXAMPLES, MESSAGES, whole
from tests.tokenizers_of_families import KINDS, tokenizer

pytestmark = pytest.mark.slow
NO_SYSTEM = {"google-gemma-2-2b-it"}


class FixedDay(datetime.datetime):
    """The day that jaxmed shows to templates, in transformers' clock."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return DATE


@pytest.fixture(autouse=True)
def _same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", FixedDay)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BEHIND)
def test_examples_have_the_ids_of_the_whole_conversation(name: str, kind: str) -> None:
    fast = tokenizer(kind, published()[name])
    for example in EXAMPLES:
        if example.system is not None and name in NO_SYSTEM:
            with pytest.raises(jm.UserError, match="System role not supported"):
                encode_example(fast, example)
            continue
        expected, got = whole(fast, example), encode_example(fast, example)
        assert got.ids.tolist() == expected[: len(got.ids)]
        assert not fast.decode(expected[len(got.ids) :], skip_special_tokens=True).strip()
        assert bool(got.seam) == (BEHIND[name] is None or ("Mistral-Nemo" in name and example.system is not None))
        if not got.seam:
            assert got.ids[: len(render(fast, example).ids)].tolist() == render(fast, example).ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BEHIND)
def test_answers_have_the_ids_of_the_whole_conversation(name: str, kind: str) -> None:
    fast, gap = tokenizer(kind, published()[name]), BEHIND[name]
    for word, other in (("Sure", "No"), ("It is", "Sure, here")):
        pair = jm.PromptPair("p", "hi there", "how are you?", (word,), (other,), base_prefill=gap or "", source_prefill=gap or "")
        for side in ("base", "source"):
            assert render(fast, replace(pair, base_prefill="", source_prefill=""), side).gap == gap
            found = [*render(fast, pair, side).ids.tolist(), *encode_answers(fast, pair, ("prefix-gap",)).ids[0]]
            expected = whole(fast, jm.Example(getattr(pair, side), word))
            assert (found == expected[: len(found)]) == (gap is not None)


@pytest.mark.parametrize("name", BEHIND)
def test_the_users_message_is_found(name: str) -> None:
    fast = tokenizer("byte-level BPE", published()[name])
    for message in MESSAGES:
        prompt = render(fast, jm.PromptPair("p", message, "x", ("a",), ("b",)))
        assert prompt.text[slice(*prompt.user)].strip() == message.strip()
