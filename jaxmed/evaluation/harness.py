"""Our models under lm-evaluation-harness (the optional extra `jaxmed[harness]`): its tasks, our decoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxmed.batching.scoring import score_responses
from jaxmed.errors import UserError
from jaxmed.generation import cut_at, generate_ids
from jaxmed.models.model import Model
from jaxmed.tokens import TokenizedExample, need_tokenizer, render_chat, text_ids

MOST_TOKENS = 256
"""Tokens of an answer where a task sets no limit."""


def _ids(numbers: Sequence[int]) -> np.ndarray:
    return np.asarray(numbers, np.int32)


class HarnessModel(TemplateLM):
    """A loaded model as the harness calls it."""

    def __init__(self, model: Model):
        super().__init__()
        need_tokenizer(model.tokenizer)
        self.model = model
        self.tokenizer = model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: begin-of-sequence, or the end where there is none."""
        start = self.model.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; begin-of-sequence once, where the tokenizer adds one, unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return list(self.model.tokenizer(string, add_special_tokens=False)["input_ids"])
        return text_ids(self.model.tokenizer, string).tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, at the fixed date; without a generation prompt, the last answer is left open."""
        more = {} if add_generation_prompt else {"continue_final_message": True}
        return render_chat(self.model.tokenizer, chat_history, add_generation_prompt, **more)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities, whether all tokens are the likeliest) of every continuation; long contexts lose their start."""
        most = self.model.config.max_length + 1  # the last token is only predicted
        examples = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-most:]
            examples.append(TokenizedExample(ids=_ids(ids), prompt=max(1, len(ids) - len(continuation))))
        scored = score_responses(self.model, examples)
        return [(float(one.log_probabilities.sum(dtype=float)), bool(one.likeliest.all())) for one in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of the model's length where they are longer."""
        most = self.model.config.max_length
        asked, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, most, 1)):
                asked.append((None, *window))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(asked), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled answers, up to the first of their stop texts."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            given = dict(requests[numbers[0]].args[1])
            until = [given["until"]] if isinstance(given.get("until"), str) else list(given.get("until") or ())
            lengths = (given[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if given.get(name))
            most = int(next(lengths, MOST_TOKENS))
            sampled = given.get("do_sample", False)
            how: dict[str, Any] = {
                "temperature": float(given.get("temperature", 1.0)) if sampled else 0.0,
                "top_p": float(given.get("top_p", 1.0)),
            }
            room = self.model.config.max_length - most
            prompts = [_ids(self.tok_encode(requests[number].args[0])[-room:]) for number in numbers]
            for number, ids in zip(numbers, generate_ids(self.model, prompts, most, stop_texts=until, **how), strict=True):
                text = self.model.tokenizer.decode(ids, skip_special_tokens=True)
                answers[number] = cut_at(text, until)
        return answers


@cache
def _task_manager(folder: Path | None) -> TaskManager:
    """The harness's tasks and those in `folder`; thousands of files are read for that, so once."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=None if folder is None else str(folder))


def check_tasks(tasks: Sequence[str], folder: Path | None = None) -> TaskManager:
    """The harness's tasks and those in `folder`; a UserError where one is unknown."""
    manager = _task_manager(folder)
    if missing := [name for name in tasks if not manager.match_tasks([name])]:
        raise UserError(f"lm-evaluation-harness knows no task {', '.join(missing)}. Name one of its tasks, or give --task-folder.")
    return manager


def run_tasks(
    model: Model, tasks: Sequence[str], folder: Path | None = None, fewshot: int | None = None, limit: int | None = None, chat: bool = False
) -> dict[str, dict[str, Any]]:
    """Results of tasks of the harness: task -> its numbers, as the harness names them.

    Args:
        tasks: names of the harness's tasks, or of those in `folder`.
        folder: the user's own task files (.yaml).
        fewshot: examples before every question; None: as the task says.
        limit: the first so many documents only.
        chat: whether questions are rendered with the chat template.

    Raises:
        UserError: unknown tasks, or tasks whose data cannot be had.
    """
    manager = check_tasks(tasks, folder)
    how: dict[str, Any] = {
        "num_fewshot": fewshot,
        "limit": limit,
        "apply_chat_template": chat,
        "bootstrap_iters": 1000,
        "log_samples": False,
    }
    try:
        found = simple_evaluate(HarnessModel(model), tasks=list(tasks), task_manager=manager, **how)
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise UserError(f"The data of these tasks cannot be had: {str(error).splitlines()[0][:300]}") from None
    return {name: dict(numbers) for name, numbers in (found or {}).get("results", {}).items()}
