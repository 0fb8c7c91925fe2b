"""Generation against transformers, and that padding, batches and edits mean what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.errors import Notice
from jaxmed.generation import generate_ids, texts, writers
from jaxmed.interventions.edits import where
from jaxmed.models.load import load
from jaxmed.models.model import Model
from jaxmed.tokens import prompt_ids
from tests import reference, tiny

torch = reference.torch
PROMPTS = [np.arange(3, 3 + count) for count in (5, 12, 7, 9, 2)]


def _continued(model: Model, prompt: Any, most: int, **more: Any) -> list[int]:
    """Greedy text by whole forward passes."""
    ids = list(prompt)
    for _ in range(most):
        ids.append(int(np.asarray(jm.forward(model, ids, **more)[0])[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
def test_greedy_text_is_that_of_whole_forward_passes(tiny_model: Model) -> None:
    found = generate_ids(tiny_model, PROMPTS, 6, stops=[], rows=2)
    assert [ids.tolist() for ids in found] == [_continued(tiny_model, prompt, 6) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3-moe", "olmo3", "mistral"])
def test_families_write_as_transformers_does(name: str, tmp_path: Any) -> None:
    made = reference.save(name, tmp_path)
    prompt = reference.tokens(20)
    wanted = made.generate(torch.as_tensor(prompt), max_new_tokens=10, do_sample=False, eos_token_id=None, use_cache=False)
    assert generate_ids(load(str(tmp_path)), list(prompt), 10, stops=[])[0].tolist() == wanted[0, 20:].tolist()


@pytest.mark.slow
def test_the_default_model_writes_as_transformers_does(default_model: Model, tmp_path: Any) -> None:
    """Token for token, from prompts of different lengths in one batch."""
    jm.export_folder(default_model, tmp_path / "model")
    made: Any = reference.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompts = [prompt_ids(default_model.tokenizer, jm.Example(pair.source)) for pair in jm.read_pairs("harm")[:40:5]]
    ours = generate_ids(default_model, prompts, 24, rows=8)
    for prompt, ids in zip(prompts, ours, strict=True):
        given = torch.as_tensor(prompt[None].astype(np.int64))
        theirs = made.generate(given, max_new_tokens=24, do_sample=False, eos_token_id=[0, 2], pad_token_id=2)[0, len(prompt) :].tolist()
        assert ids.tolist() == [token for token in theirs if token not in (0, 2)]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"edits": jm.edits.zero("mlp_out", layer=1), "where": "generated"}])
def test_all_writers_write_the_same(plain_model: Model, monkeypatch: pytest.MonkeyPatch, count: int, how: dict[str, Any]) -> None:
    """By layer on one device, and by one program on all devices, one token at a call or several."""
    write = lambda: [ids.tolist() for ids in generate_ids(plain_model, PROMPTS[:2], 6, stops=[], **how)]  # noqa: E731
    assert texts.writer(plain_model) is writers.write_by_layer
    by_layer = write()
    monkeypatch.setattr(texts, "writer", lambda model: writers.write_at_once)
    monkeypatch.setattr(writers, "tokens_at_once", lambda mesh: count)
    assert write() == by_layer


def test_a_text_ends_before_its_stop_token(plain_model: Model) -> None:
    whole = generate_ids(plain_model, PROMPTS[:1], 6, stops=[])[0].tolist()
    stop = whole[3]
    assert generate_ids(plain_model, PROMPTS[:1], 6, stops=[stop])[0].tolist() == whole[: whole.index(stop)]


@pytest.mark.slow
def test_edits_act_where_they_are_meant_to(plain_model: Model) -> None:
    edit = jm.edits.zero("mlp_out", layer=1)
    found = {half: generate_ids(plain_model, PROMPTS[:1], 6, stops=[], edits=edit, where=half)[0].tolist() for half in ("both", "prompt")}
    assert found["both"] == _continued(plain_model, PROMPTS[0], 6, edits=edit)
    count = len(PROMPTS[0])
    alone = jm.edits.zero("mlp_out", layer=1, position=list(range(count)))
    assert found["prompt"] == _continued(plain_model, PROMPTS[0], 6, edits=alone)
    only = generate_ids(plain_model, PROMPTS[:1], 6, stops=[], edits=edit, where="generated")[0].tolist()
    assert only[0] == _continued(plain_model, PROMPTS[0], 1)[0]
    assert only != found["both"]


def test_rows_of_a_batch_take_edits_of_their_own(plain_model: Model) -> None:
    prompts = [PROMPTS[0]] * 3
    edits = {"neuron": jm.Edit(1.0, np.asarray([8.0, -9.0], np.float32), where=where(layer=[0, 1], unit=[3, 5], row=[0, 2]))}
    found = generate_ids(plain_model, prompts, 6, stops=[], edits=edits)
    for row, (layer, unit, value) in {0: (0, 3, 8.0), 2: (1, 5, -9.0)}.items():
        one = {"neuron": jm.Edit(1.0, np.asarray([value], np.float32), where=where(layer=layer, unit=unit))}
        assert found[row].tolist() == _continued(plain_model, PROMPTS[0], 6, edits=one)
    assert found[1].tolist() == _continued(plain_model, PROMPTS[0], 6)


@pytest.mark.slow
def test_samples_follow_the_seed_and_not_the_batch(plain_model: Model) -> None:
    draw = lambda rows, seed: [x.tolist() for x in generate_ids(plain_model, PROMPTS, 6, 1.0, 0.9, seed, stops=[], rows=rows)]  # noqa: E731
    assert draw(2, 0) == draw(5, 0)
    assert draw(2, 0) != draw(2, 1)
    greedy = [x.tolist() for x in generate_ids(plain_model, PROMPTS, 6, stops=[])]
    assert [x.tolist() for x in generate_ids(plain_model, PROMPTS, 6, 1.0, 1e-6, stops=[])] == greedy


def test_a_prefill_opens_the_answer(plain_model: Model) -> None:
    asked = jm.Example("how to")
    opened = [*prompt_ids(plain_model.tokenizer, asked).tolist(), *plain_model.tokenizer("ok", add_special_tokens=False)["input_ids"]]
    wanted = plain_model.tokenizer.decode(_continued(plain_model, opened, 4), skip_special_tokens=True)
    assert jm.generate(plain_model, [jm.Example("how to", prefill="ok")], 4, stops=[]) == [wanted]
    assert jm.generate(plain_model, [asked], 4, stops=[]) != [wanted]


def test_texts_go_in_and_out(plain_model: Model) -> None:
    assert len(jm.generate(plain_model, ["how to", jm.Example("why")], 4)) == 2
    plain = jm.generate(plain_model, ["ab"], 4, "text", stops=[])[0]
    ids = generate_ids(plain_model, [tiny.tokenizer()("ab")["input_ids"]], 4, stops=[])[0]
    assert plain == tiny.tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[]]}, "no tokens"),
        ({"max_tokens": 0}, "at least 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"where": "answer"}, "generated"),
        ({"stop_texts": ["fine", "half \ud800"]}, "half of a surrogate pair"),
        ({"edits": {"attention_pattern": jm.Edit(1.0, 0.0)}}, "grow with it"),
        ({"edits": {"mlp_out": jm.Edit(1.0, np.zeros((3, 1, 5, 16)))}}, "single entries"),
    ],
)
def test_wrong_requests_are_refused(plain_model: Model, more: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        generate_ids(plain_model, **{"prompts": PROMPTS, "max_tokens": 4, **more})


@pytest.mark.parametrize("max_tokens", [4, 5, 40])
def test_answers_may_be_longer_than_rotary_models_were_made_for_and_not_than_learned_positions(max_tokens: int) -> None:
    model = tiny.model("llama")
    asked = [np.arange(3, 12), np.arange(3, 15)]
    short, learned = (replace(model, config=replace(model.config, max_length=16, **how)) for how in ({}, {"rope": None}))
    free = [ids.tolist() for ids in generate_ids(model, asked, max_tokens, stops=[])]
    if max_tokens == 4:  # 12 tokens and 4 more fit
        assert [ids.tolist() for ids in generate_ids(short, asked, max_tokens, stops=[])] == free
        return
    with pytest.warns(Notice, match=f"{12 + max_tokens} tokens exceed the 16"):
        assert [ids.tolist() for ids in generate_ids(short, asked, max_tokens, stops=[])] == free
    with pytest.raises(jm.UserError, match="learned positions for 16"):
        generate_ids(learned, asked, max_tokens)


WRITTEN = {
    "a whole output": lambda **more: jm.edits.zero("mlp_out", layer=1, **more),
    "a neuron of some rows": lambda **more: {
        "neuron": jm.Edit(1.0, np.asarray([9.0, -9.0], np.float32), where=where(layer=[0, 1], unit=[3, 5], row=[0, 1], **more))
    },
    "a direction": lambda **more: jm.edits.steer("residual_out", np.linspace(-3, 3, 16), 2.0, layer=2, **more),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_current_is_every_token_as_it_is_written(plain_model: Model, kind: str) -> None:
    make = WRITTEN[kind]
    ask = lambda edits, half: [x.tolist() for x in generate_ids(plain_model, PROMPTS[:2], 6, stops=[], edits=edits, where=half)]  # noqa: E731
    wanted = ask(make(), "generated")
    assert ask(make(position="current"), "both") == ask(make(position="current"), "generated") == wanted
    assert wanted != ask({}, "both")


def test_current_stands_beside_tokens_of_the_prompt(plain_model: Model) -> None:
    prompt = PROMPTS[:1]
    both = jm.edits.zero("mlp_out", layer=1, position=[0, 2, "current"])
    found = generate_ids(plain_model, prompt, 6, stops=[], edits=both)[0].tolist()
    numbers = [0, 2, *range(len(prompt[0]), len(prompt[0]) + 5)]
    assert found == generate_ids(plain_model, prompt, 6, stops=[], edits=jm.edits.zero("mlp_out", layer=1, position=numbers))[0].tolist()
    assert found != generate_ids(plain_model, prompt, 6, stops=[], edits=jm.edits.zero("mlp_out", layer=1, position="current"))[0].tolist()


@pytest.mark.parametrize(
    ("position", "half"),
    [
        (-1, "both"),
        (-1, "generated"),
        ([0, -1], "both"),
        (99, "both"),
        (99, "prompt"),
        (-99, "prompt"),
        (0, "generated"),
        (99, "generated"),
    ],
)
def test_positions_that_match_nothing_while_generating_are_refused(plain_model: Model, position: Any, half: str) -> None:
    edits = jm.edits.zero("mlp_out", layer=1, position=position)
    wrong = position[1] if isinstance(position, list) else position
    with pytest.raises(jm.UserError, match=rf"position {wrong}, which .*position=\"current\""):
        generate_ids(plain_model, PROMPTS, 4, edits=edits, where=half)


def test_positions_of_a_row_are_held_against_its_own_prompt(plain_model: Model) -> None:
    lengths = [len(prompt) for prompt in PROMPTS]
    row, most = int(np.argmin(lengths)), max(lengths)
    assert most > min(lengths) + 1
    edit = jm.Edit(0.0, 0.0, 1.0, where=where(position=most - 1, row=row))
    with pytest.raises(jm.UserError, match=f"position {most - 1}"):
        generate_ids(plain_model, PROMPTS, 1, edits={"mlp_out": edit}, where="both")
    edit = jm.Edit(0.0, 0.0, 1.0, where=where(position=-min(lengths), row=row))
    assert generate_ids(plain_model, PROMPTS, 1, edits={"mlp_out": edit}, where="prompt")


def test_current_belongs_to_writing_alone(plain_model: Model) -> None:
    edits = jm.edits.zero("mlp_out", position="current")
    with pytest.raises(jm.UserError, match="`generate` writes"):
        jm.forward(plain_model, PROMPTS[0][None], edits)
    with pytest.raises(jm.UserError, match="acts on the prompt alone"):
        generate_ids(plain_model, PROMPTS, 4, edits=edits, where="prompt")
    for other in (jm.edits.zero("mlp_out", position=3), jm.edits.scale("mlp_out", 2.0), edits):
        with pytest.raises(jm.UserError, match="same entry"):
            jm.edits.merge(edits, other)
