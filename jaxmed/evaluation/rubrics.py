"""Rubrics: what a judge that is a language model is asked about a request and an answer."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from jaxmed.errors import UserError, quoted
from jaxmed.prompts.templates import fill

RUBRIC = "rubric"
"""The bundled rubric's name: how far a reply does what was asked."""
ALIGNMENT, COHERENCE = "rubric_alignment", "rubric_coherence"
BUNDLED = (RUBRIC, ALIGNMENT, COHERENCE)
PLACES = ("prompt", "response")
_PLACE = re.compile(r"\{(?:forbidden_)?(prompt)\}|\{(response)\}")


def read_rubric(source: str | Path) -> str:
    """A rubric with the places {prompt} (or {forbidden_prompt}) and {response}: a text file, or one of `BUNDLED`.

    Raises:
        UserError: no such file, or a place that is missing.
    """
    path = Path(source)
    if str(source) in BUNDLED and not path.exists():
        text = (resources.files("jaxmed.prompts") / "data" / f"{source}.txt").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{quoted(str(source))} is not UTF-8 text: {error}.") from None
    else:
        raise UserError(f"There is no rubric file {quoted(str(source))}. Give a text file with the places {{prompt}} and {{response}}.")
    return check_rubric(text, source)


def check_rubric(text: str, source: str | Path) -> str:
    """The rubric; a UserError where it lacks a place for what it is about."""
    missing = set(PLACES) - {found[1] or found[2] for found in _PLACE.finditer(text)}
    if missing:
        raise UserError(f"The rubric {quoted(str(source))} lacks {' and '.join(f'{{{name}}}' for name in sorted(missing))}.")
    return text


def ask(rubric: str, prompt: str, response: str) -> str:
    """The rubric about one answer."""
    return fill(rubric, prompt=prompt, forbidden_prompt=prompt, response=response)
