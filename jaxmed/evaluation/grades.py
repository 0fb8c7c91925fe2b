"""Grades of answers: what gives them, and how one is read out of what a model at an endpoint sends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxmed.prompts.examples import Example

Judge = Callable[[Sequence[Example], Sequence[str], Callable[[int], None]], list[float | None]]
"""(requests, answers, report) -> grades from 0 to 1, None where it could not tell; `report` gets the number of answers after every part."""

NUMBER = r"(?<![\w.])(?<!\d[\u2013-])([-+\u2212\u2013]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}))(?![A-Za-z\d%\u2013-])"
_NUMBER = re.compile(NUMBER)
_NAMED = re.compile(
    r"(?:grade|score|rating)(?:\s*\([^()\n]{1,40}\))?(?:\W{1,4}(?:is|of|a|an|as|be|was|would|equals)\b){0,3}[^\w.+\u2212\u2013-]{0,6}(?:[\u2013-][^\w.]{1,2})?"
    + NUMBER,
    re.IGNORECASE,
)
_ALONE = re.compile(rf"(?:^|\n)[\s*_#>]*{NUMBER}[\s*_.]*(?=\n|$)")


def parse_grade(reply: str, lowest: float, highest: float) -> float | None:
    """The grade of a reply as 0 .. 1: the last number that follows the word grade, score or rating or has a line of its own, or else its
    only number.

    None where there is no such number, where there are several, and where it is no grade.
    """
    given = [(found.start(1), found[1]) for pattern in (_NAMED, _ALONE) for found in pattern.finditer(reply)]
    numbers = {found[1] for found in _NUMBER.finditer(reply)}
    found = max(given)[1] if given else numbers.pop() if len(numbers) == 1 else None
    if found is None:
        return None
    value = float(found.replace("\u2212", "-").replace("\u2013", "-"))
    return (value - lowest) / (highest - lowest) if lowest <= value <= highest else None


def read_content(body: str) -> str | None:
    """What the model at an endpoint said, of texts and of lists of parts; None where the body is no chat completion."""
    try:
        content: Any = json.loads(body)["choices"][0]["message"]["content"]
        if isinstance(content, list):
            content = "".join(map(_said, content))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    return "" if content is None else content if isinstance(content, str) else None


def _said(part: Any) -> str:
    """The text of a part of a message, "" of parts that hold something else."""
    if isinstance(part, str):
        return part
    return part["text"] if part.get("type", "text") in ("text", "output_text") else ""
