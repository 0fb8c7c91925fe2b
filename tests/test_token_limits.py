"""Ids, lengths and ends of answers, where they enter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.scoring import example_losses
from jaxmed.errors import Notice
from jaxmed.generation import stop_tokens
from jaxmed.models.config import Rope
from jaxmed.tokens import batch, check_length, encode_example, pad
from jaxmed.tokens.ends import end_tokens
from tests import tiny
from tests.tokenizers_of_families import tokenizer

SMALL = replace(tiny.model("llama"), config=replace(tiny.LLAMA, vocabulary=100))
"""A model whose tokenizer has letters beyond its embedding."""
PAIR = jm.PromptPair("p", "do a", "do b", ("S",), ("N",))


@pytest.mark.parametrize(
    "call",
    [
        lambda: jm.forward(SMALL, [[1, 100]]),
        lambda: jm.sweep(SMALL, [replace(PAIR, base="\u00e9")], unit="mlp_out"),
        lambda: jm.sweep(SMALL, [replace(PAIR, source="\u00e9")], unit="mlp_out"),
        lambda: jm.sweep(SMALL, [replace(PAIR, target=("\u00e9",))], "prefix-gap", unit="mlp_out"),
        lambda: jm.generate(SMALL, ["\u00e9"], 2),
        lambda: example_losses(SMALL, [encode_example(SMALL.tokenizer, jm.Example("\u00e9", "a"))]),
        lambda: example_losses(SMALL, [encode_example(SMALL.tokenizer, jm.Example("a", "\u00e9"))]),
        lambda: jm.finetune(SMALL, [jm.Example("a", "\u00e9")], steps=1),
        lambda: jm.pruning.score(SMALL, [jm.Example("\u00e9", "a")], [jm.Example("a", "b")]),
    ],
)
def test_ids_beyond_the_embedding_are_refused(call: Any) -> None:
    with pytest.raises(jm.UserError, match=r"0 to 99"):
        call()


def test_lengths_beyond_learned_positions_are_refused_and_beyond_rotary_ones_told_of() -> None:
    learned, scaled = replace(tiny.LLAMA, rope=None), replace(tiny.LLAMA, rope=Rope(scaling="linear"))
    check_length(learned, 512)
    with pytest.raises(jm.UserError, match="learned positions for 512"):
        check_length(learned, 513)
    with pytest.warns(Notice, match="the 512 this model was made for .rotary positions, scaling linear"):
        check_length(scaled, 513)


def test_a_long_sweep_and_a_long_forward_are_told_of() -> None:
    short = replace(tiny.model("llama"), config=replace(tiny.LLAMA, max_length=16))
    with pytest.warns(Notice, match="exceed the 16"):
        jm.forward(short, np.ones((1, 17), np.int32))
    jm.forward(short, np.ones((1, 17), np.int32), padding=np.ones(1, np.int32))
    with pytest.warns(Notice, match="exceed the 16"):
        jm.sweep(short, [replace(PAIR, base="a rather long request")], unit="mlp_out", layers=[2])


@pytest.mark.parametrize("text", ["hi", ["hi", "there"], ("hi",)])
def test_text_for_the_forward_pass_names_what_makes_ids(text: Any) -> None:
    with pytest.raises(jm.UserError, match=r"jm\.tokens\.batch"):
        jm.forward(tiny.model("llama"), text)


def test_batches_of_texts_run_as_the_texts_alone() -> None:
    model, texts = tiny.model("llama"), ["hi", "how do you do", [{"role": "user", "content": "so"}]]
    ids, padding = jm.tokens.batch(model, texts)
    logits = jm.forward(model, ids, padding=padding)[0]
    for row, text in enumerate(texts):
        alone = jm.forward(model, jm.tokens.render(model, text).ids)[0][0, -1]
        np.testing.assert_allclose(logits[row, -1], alone, atol=1e-4)
    assert batch(model.tokenizer, texts, "chat")[0].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("prompts", "length", "said"), [([], None, "no prompt"), ([[1], []], None, "Prompt 1 has no"), ([[1, 2, 3]], 2, "fit into 2")]
)
def test_prompts_that_cannot_be_padded(prompts: list[list[int]], length: int | None, said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        pad([np.asarray(one, np.int32) for one in prompts], length)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (["</s>", "<end_of_turn>"], "<|turn|>", {"</s>", "<end_of_turn>"}),
        ("<|im_end|>", "<|turn|>", {"<|im_end|>"}),
        (None, ["<|turn|>"], {"<|turn|>", "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_role|>"}),
        (None, None, {"</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_role|>"}),
    ],
)
def test_answers_end_where_the_checkpoint_says(generation: Any, config: Any, expected: set[str]) -> None:
    fast = tokenizer("byte-level BPE", "ChatML")
    entries = [{"eos_token_id": fast.convert_tokens_to_ids(named), "max_length": 5} for named in (generation, config) if named]
    given = (entries[0] if generation else {"max_length": 5}, entries[-1] if config else None)
    assert set(fast.convert_ids_to_tokens(end_tokens(fast, *given))) == expected


@pytest.mark.parametrize("entry", ["7", 7.0, True, [7, None], [[7]], {"a": 7}])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_token_is_refused(entry: Any, file: str) -> None:
    given = {"eos_token_id": entry}
    with pytest.raises(jm.UserError, match=f"{file} has .* as eos_token_id"):
        end_tokens(None, *((given, None) if file.startswith("generation") else (None, given)))
    assert end_tokens(None, {"eos_token_id": None}, {"eos_token_id": [5, 7, 5]}) == [5, 7]


def test_a_tag_of_the_vocabulary_ends_nothing() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: at for at, word in enumerate(("<unk>", "<eos>", "</s>", "<|end|>", "hi"))}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), eos_token="<eos>", unk_token="<unk>")
    assert end_tokens(fast) == [1]
    fast.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert end_tokens(fast) == [1, 3]


def test_the_generation_config_of_a_folder_is_read_and_exported(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "m", eos_token_id=7)
    assert stop_tokens(jm.load(str(folder), check=False)) == [7]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    model = jm.load(str(folder), check=False)
    assert stop_tokens(model) == [3, 5]
    assert stop_tokens(jm.load(str(jm.export_folder(model, tmp_path / "copy")), check=False)) == [3, 5]
