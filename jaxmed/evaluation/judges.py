"""Judges: what says of a model's answers how far they refuse, or how far they do what was asked.

A judge maps requests and answers to numbers from 0 to 1; None where it could not tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from scipy import stats

from jaxmed.errors import UserError
from jaxmed.evaluation.refusals import is_refusal
from jaxmed.prompts.examples import Example

Judge = Callable[[Sequence[Example], Sequence[str], Callable[[int], None]], list[float | None]]
"""(requests, answers, report) -> scores; `report` is called with the number of answers after every part."""
FEWEST = 10
"""Below, a mean has no interval: too few to resample."""


def refusal_rules(short: int = 0) -> Judge:
    """1 for an answer that declines by the rules of `harm.refusals`, 0 for others; see `is_refusal` for `short`."""

    def judge(requests: Sequence[Example], answers: Sequence[str], report: Callable[[int], None]) -> list[float | None]:
        report(len(answers))
        return [float(is_refusal(text, short)) for text in answers]

    return judge


@dataclass(frozen=True)
class Mean:
    """The mean score of a group of answers.

    Attributes:
        low, high: 95 % BCa bootstrap interval over answers; NaN below `FEWEST`.
        unjudged: answers without a score; they are left out.
    """

    name: str
    value: float
    answers: int
    low: float
    high: float
    unjudged: int = 0


def mean_score(name: str, scores: Sequence[float | None], resamples: int = 2000, seed: int = 0) -> Mean:
    """The mean of the scores there are, with its interval."""
    kept = np.array([score for score in scores if score is not None])
    value, unjudged = float(kept.mean()) if len(kept) else math.nan, len(scores) - len(kept)
    if len(kept) < FEWEST:
        return Mean(name, value, len(kept), math.nan, math.nan, unjudged)
    if np.ptp(kept) == 0:
        return Mean(name, value, len(kept), value, value, unjudged)
    found = stats.bootstrap((kept,), np.mean, n_resamples=resamples, method="BCa", rng=seed).confidence_interval
    return Mean(name, value, len(kept), float(found.low), float(found.high), unjudged)


def mean_scores(examples: Sequence[Example], scores: Sequence[float | None], by: str = "kind") -> list[Mean]:
    """Mean scores of every value of a column, in order of appearance."""
    groups: dict[str, list[float | None]] = {}
    for example, score in zip(examples, scores, strict=True):
        groups.setdefault(getattr(example, by) or "all", []).append(score)
    return [mean_score(name, found) for name, found in groups.items()]


RUBRIC = "rubric"
"""The bundled rubric's name."""
_PLACES = re.compile(r"\{(prompt|forbidden_prompt|response)\}")


def read_rubric(source: str | Path) -> str:
    """A rubric with the places {prompt} (or {forbidden_prompt}) and {response}: a text file, or the bundled one.

    Raises:
        UserError: no such file, or a place that is missing.
    """
    path = Path(source)
    if str(source) == RUBRIC and not path.exists():
        text = (resources.files("jaxmed.prompts") / "data" / "rubric.txt").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 text: {error}.") from None
    else:
        raise UserError(f"There is no rubric file {str(source)!r}. Give a text file with the places {{prompt}} and {{response}}.")
    return check_rubric(text, source)


def check_rubric(text: str, source: str | Path) -> str:
    """The rubric; a UserError where it lacks a place for what it is about."""
    places = {found.group(1).removeprefix("forbidden_") for found in _PLACES.finditer(text)}
    if places != {"prompt", "response"}:
        raise UserError(f"The rubric {source} lacks {' and '.join(f'{{{name}}}' for name in sorted({'prompt', 'response'} - places))}.")
    return text


def fill(rubric: str, prompt: str, response: str) -> str:
    """The rubric about one answer. What is filled in is not searched for places again."""
    values: Mapping[str, str] = {"prompt": prompt, "forbidden_prompt": prompt, "response": response}
    return _PLACES.sub(lambda found: values[found.group(1)], rubric)
