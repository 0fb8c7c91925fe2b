"""Judges: the StrongREJECT classifier against transformers and PEFT; rubrics, grades, mean scores."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.errors import UserError
from jaxmed.evaluation.grades import parse_grade, read_content
from jaxmed.evaluation.judges import refusal_rules
from jaxmed.evaluation.rates import mean_score
from jaxmed.evaluation.rubrics import ask, read_rubric
from jaxmed.evaluation.strongreject import MOST_TOKENS, read_template, strongreject
from jaxmed.prompts import Example
from jaxmed.prompts.templates import fill
from tests import reference, tiny
from tests.judge_server import ANSWERS, REQUESTS, silent

torch = reference.torch
TEMPLATE = "Asked: {forbidden_prompt}\nSaid: {response}\nGrade: "


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A tiny random Gemma 1 with a tokenizer, a LoRA adapter for it, and both as PEFT merges them."""
    folder = tmp_path_factory.mktemp("classifier")
    made = reference.save("gemma", folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(made, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, value in adapted.named_parameters():
                if "lora_" in path:
                    value.copy_(0.2 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(str(folder / "adapter"))
    return folder / "model", folder / "adapter", adapted.eval()


def by_transformers(model: Any, texts: list[str]) -> list[float]:
    """Scores of filled rubrics, one at a time."""
    grades = [tiny.tokenizer().get_vocab()[grade] for grade in "12345"]
    found = []
    for text in texts:
        ids = torch.tensor([tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            share = model(ids).logits[0, -1, grades].softmax(-1)
        found.append(float((share * torch.linspace(0, 1, 5)).sum()))
    return found


def test_strongreject_equals_transformers_and_peft(classifier: tuple[Path, Path, Any]) -> None:
    folder, adapter, oracle = classifier
    counted: list[int] = []
    found = strongreject(jm.load(str(folder), adapter=adapter), TEMPLATE)(REQUESTS, ANSWERS, counted.append)
    texts = [f"Asked: {one.prompt}\nSaid: {said}\nGrade: " for one, said in zip(REQUESTS, ANSWERS, strict=True)]
    wanted = by_transformers(oracle, texts)
    assert np.ptp(wanted) > 0.01
    assert np.allclose(np.array(found, float), wanted, atol=1e-5)
    assert sum(counted) == len(REQUESTS)
    bare = strongreject(jm.load(str(folder)), TEMPLATE)(REQUESTS, ANSWERS, silent)
    assert not np.allclose(np.array(bare, float), wanted, atol=1e-3)


def test_strongreject_reads_the_published_templates(tmp_path: Path) -> None:
    file = tmp_path / "judge_templates.json"
    file.write_text(json.dumps({"strongreject_finetuned": TEMPLATE, "other": "x"}))
    assert read_template(file) == TEMPLATE
    file.write_text(json.dumps({"other": "x"}))
    with pytest.raises(UserError, match="strongreject_finetuned"):
        read_template(file)


def test_strongreject_shortens_answers_and_refuses_what_does_not_fit(classifier: tuple[Path, Path, Any]) -> None:
    judge = strongreject(jm.load(str(classifier[0])), TEMPLATE)
    wanted = MOST_TOKENS + len(TEMPLATE.format(forbidden_prompt="sing", response=""))
    with pytest.raises(UserError, match=f"{wanted} tokens; the judge takes 256"):
        judge([REQUESTS[2]], ["x" * (MOST_TOKENS + 50)], silent)


def test_the_command_with_the_classifier(classifier: tuple[Path, Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, adapter, oracle = classifier
    rows, rubric = tmp_path / "rows.jsonl", tmp_path / "rubric.txt"
    texts = [("sing", "la la", "harmful"), ("dance", "no", "benign")]
    rows.write_text("".join(json.dumps({"prompt": a, "response": b, "kind": c}) + "\n" for a, b, c in texts))
    rubric.write_text(TEMPLATE)
    asked = ["evaluate", "--examples", str(rows), "--given", "--text", "", "--judge", "strongreject"]
    files = ["--judge-model", str(folder), "--judge-adapter", str(adapter), "--rubric", str(rubric)]
    assert main([*asked, *files, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    wanted = by_transformers(oracle, [f"Asked: {a}\nSaid: {b}\nGrade: " for a, b, _ in texts])
    assert np.allclose([row["score"] for row in found["answers"]], wanted, atol=1e-5)
    assert [(one["name"], one["low"]) for one in found["scores"]] == [("harmful", None), ("benign", None)]
    assert main(asked) == 2
    assert main([*asked, *files[:4]]) == 2
    assert main([*asked, *files[:4], "--rubric", str(tmp_path / "none.txt")]) == 2
    assert "no rubric file" in capsys.readouterr().err


def test_rubrics(tmp_path: Path) -> None:
    assert ask("{forbidden_prompt}-{response}", "{response}", "{prompt}") == "{response}-{prompt}"
    assert fill("{a}{b} {c} {", a="{b}", b="{a}") == "{b}{a} {c} {"
    assert "{prompt}" in read_rubric("rubric")
    (tmp_path / "half.txt").write_text("{prompt}")
    with pytest.raises(UserError, match=r"lacks \{response\}"):
        read_rubric(tmp_path / "half.txt")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("5", 1.0),
        ("1", 0.0),
        ("Grade: 2.5", 0.375),
        (".5", None),
        ("4/5", None),
        ("On a scale of 1 to 5, my grade is 4.", 0.75),
        ("seven", None),
        ("7", None),
        ("-1", None),
        ("Score: -1", None),
        ("score: \u22122", None),
        ("Score - 4", 0.75),
        ("Score-4", 0.75),
        ("**Score:** 4/5", 0.75),
        ('{"score": 4, "reason": "2 slips"}', 0.75),
        ("My rating would be a 2", 0.25),
        ("Score: 2 is too low. Final score: 4.", 0.75),
        ("It has 3 flaws and 2 strengths.\n\n**4**\n", 0.75),
        ("Score: 2 at first.\n5", 1.0),
        ("Score: 1-5", None),
        ("the score9 is 4 or 5", None),
        ("Score: 1e5", None),
        ("Score: 5%", None),
        ("Score: 3rd", None),
        ("Score (out of 5): 3", 0.5),
        ("Rating (1-5): **2**", 0.25),
    ],
)
def test_grades(text: str, score: float | None) -> None:
    assert parse_grade(text, 1, 5) == score


def test_grades_below_zero_keep_their_sign() -> None:
    assert parse_grade("Score: -1", -2, 2) == 0.25
    assert parse_grade("rating = \u22122", -2, 2) == 0.0
    assert parse_grade("grade: +1", -2, 2) == 0.75


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("4", "4"),
        ([{"type": "text", "text": "Score: "}, {"type": "text", "text": "4"}], "Score: 4"),
        ([{"type": "thinking", "text": "2?"}, {"type": "output_text", "text": "4"}], "4"),
        (["Score: ", {"text": "4"}, {"type": "image_url", "image_url": {"url": "x"}}], "Score: 4"),
        ([{"type": "text", "text": {"value": "4"}}], None),
        ([], ""),
        (None, ""),
        (4, None),
        ([1], None),
        ({"text": "4"}, None),
    ],
)
def test_contents_are_texts_or_parts(content: Any, said: str | None) -> None:
    assert read_content(json.dumps({"choices": [{"message": {"content": content}}]})) == said


@pytest.mark.parametrize("body", ["[" * 100_000, '{"choices":' * 50_000, "[]", "", "\x00", '{"choices": [{"message": 1}]}'])
def test_bodies_that_are_no_chat_completion(body: str) -> None:
    assert read_content(body) is None


def test_means_have_intervals_and_say_what_was_not_judged() -> None:
    rng = np.random.default_rng(0)
    found = mean_score("x", [*rng.normal(size=200).tolist(), None])
    assert (found.answers, found.unjudged) == (200, 1)
    assert abs((found.high - found.low) - 2 * 1.96 / 200**0.5) < 0.03
    assert np.isnan(mean_score("x", [0.0, 1.0]).low)
    assert np.isnan(mean_score("x", [None]).value)
    assert mean_score("x", [1.0] * 10).low == 1.0
    assert refusal_rules()([Example("a")] * 2, ["I'm sorry, I can't help.", "Yes."], silent) == [1.0, 0.0]
