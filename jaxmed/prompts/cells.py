"""Values of rows and cells, as spreadsheets, pandas and numpy leave them."""

from __future__ import annotations

import ast
import re
from typing import Any

from jaxmed.errors import quoted
from jaxmed.files import parse_json

LISTS = ("target", "foil")
LARGEST = 10**15
"""Numbers from here on are no answers, and floats do not hold all of them."""
_LIST_OF_TEXTS = re.compile(r"\[\s*['\"].*['\"]\s*,?\s*\]", re.DOTALL)


def as_text(value: Any) -> Any:
    """A number as people write it, and numbers in a list likewise: answers such as 4, and 4.0 where a column has gaps; else the value."""
    if isinstance(value, list | tuple):
        return [as_text(one) for one in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return value
    return str(int(value)) if value == int(value) else str(value)


def plain(value: Any) -> Any:
    """A row's value without what numpy wraps it in."""
    return value.tolist() if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist") else value


def is_empty(value: Any) -> bool:
    """Whether a value is an empty cell, as csv files (""), JSON (None) and pandas (NaN, NaT, NA) have it."""
    return value is None or type(value).__name__ in ("NaTType", "NAType") or (isinstance(value, float) and value != value) or value == ""


def read_cell(column: str, value: str) -> Any:
    """A cell's text; for columns of lists, a list as JSON or Python writes it, or texts between "|"; for chats, JSON.

    Raises:
        ValueError: a list of texts in another notation, such as numpy's, which separates nothing.
    """
    text = value.strip()
    if not (column == "messages" and text) and not (column in LISTS and text):
        return value
    if column == "messages" or text.startswith("["):
        try:
            return parse_json(text)
        except ValueError:
            pass
    if column in LISTS and text.startswith("["):
        if (found := _python_list(text)) is not None:
            return found
        if _LIST_OF_TEXTS.fullmatch(text):
            raise ValueError(f'column {column!r} holds {quoted(text)}; write a list as JSON, such as ["a", "b"], or as texts between "|"')
    return value.split("|")


def _python_list(text: str) -> list[Any] | None:
    """The list that Python writes as `text`, as pandas writes columns of lists to csv files; None for other texts."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if str(found) == text else None
