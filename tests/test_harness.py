"""The adapter for lm-evaluation-harness: the same numbers as the harness's own runner gives for the same checkpoint, on local tasks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from tests import reference, tiny

lm_eval = pytest.importorskip("lm_eval")
KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "choices": (
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        [
            {"question": "a bird?", "choices": ["sparrow", "a trout", "x"], "answer": 0},
            {"question": "made by bees?", "choices": ["milk", "honey"], "answer": 1},
            {"question": "the largest?", "choices": ["ant", "an elephant", "mouse"], "answer": 1},
            {"question": "the smallest?", "choices": ["ant", "an elephant", "mouse"], "answer": 0},
        ],
    ),
    "texts": (
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        [{"text": "the river was calm"}, {"text": "a long line " * 30}],
    ),
    "answers": (
        {
            "output_type": "generate_until",
            "doc_to_text": "{{country}}:",
            "doc_to_target": "x",
            "generation_kwargs": {"until": ["e", " a"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
        [{"country": "France"}, {"country": "Italy or so"}],
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (task, rows) in KINDS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_numbers_equal_those_of_the_harness_itself(tasks: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from jaxmed.evaluation.harness import HarnessModel

    made = reference.save("llama2", tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "!", "!"
    tokenizer.save_pretrained(tmp_path / "model")
    runner: Any = HFLM
    theirs = runner(pretrained=made, tokenizer=tokenizer, max_length=256)
    ours = HarnessModel(jm.load(str(tmp_path / "model")))
    manager = TaskManager(include_path=str(tasks))
    how: dict[str, Any] = {"tasks": list(KINDS), "task_manager": manager, "bootstrap_iters": 0}
    found: list[Any] = [simple_evaluate(model, **how) for model in (ours, theirs)]
    for name in KINDS:
        ours_samples, theirs_samples = (one["samples"][name] for one in found)
        for mine, other in zip(ours_samples, theirs_samples, strict=True):
            assert mine["doc_id"] == other["doc_id"]
            if name == "answers":
                assert mine["resps"] == other["resps"]
                continue
            for (one,), (two,) in zip(mine["resps"], other["resps"], strict=True):
                assert (one if name == "texts" else one[0]) == pytest.approx(two if name == "texts" else two[0], abs=2e-3)
                assert name == "texts" or one[1] == two[1]
        numbers = [{key: value for key, value in one["results"][name].items() if isinstance(value, float)} for one in found]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


@pytest.mark.slow
def test_the_command_runs_local_tasks(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(folder)
    asked = ["evaluate", "--model", str(folder), "--examples", "", "--text", "", "--task-folder", str(tasks), "--form", "plain"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*asked, "--tasks", "choices", "--fewshot", "1", "--out", str(tmp_path / "out.json")]) == 0
        found = json.loads((tmp_path / "out.json").read_text())["tasks"]["choices"]
        assert 0 <= found["acc,none"] <= 1
        assert main([*asked, "--tasks", "nothing"]) == 2
    assert "knows no task nothing" in capsys.readouterr().err
