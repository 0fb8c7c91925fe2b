"""Values out of a user's texts. Here alone it is decided what no text may hold and no file may do to the program that reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

TOO_DEEP = "it is nested too deeply"
HALF = "holds half of a surrogate pair (an escape such as \\ud83d alone), which is no character; write the whole character"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, or of its bytes as UTF-8.

    Raises:
        ValueError: no JSON, nested too deeply, or with texts that are none (`odd_text`); its text says which, in few words.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"not valid JSON: {TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    _refuse_odd(value)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises a ValueError as `parse_json` does."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"not valid YAML: {TOO_DEEP}") from None
    except Exception as error:  # the constructors of dates, numbers and sets raise many types on texts that are none
        raise ValueError(f"not valid YAML: {error}") from None
    _refuse_odd(value)
    return value


def _refuse_odd(value: Any) -> None:
    if said := odd_text(value):
        raise ValueError(said)


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number that a float holds."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def odd_text(value: Any, name: str = "") -> str:
    """What is wrong with the texts in a value, at any depth, keys included: "" where every one of them can be written as UTF-8.

    Args:
        name: what the value is called, for the message.
    """
    try:
        return _odd(value, name)
    except RecursionError:
        return f"{name or 'the value'}: {TOO_DEEP}"


def _odd(value: Any, name: str) -> str:
    if isinstance(value, str):
        try:
            value.encode()
            return ""
        except UnicodeEncodeError:
            return f"{name or 'a text'} {HALF}"
    if isinstance(value, Mapping):
        inside = (said for key, held in value.items() for said in (_odd(key, "a name"), _odd(held, _under(name, key))) if said)
        return next(inside, "")
    if isinstance(value, (list, tuple)):
        return next((said for number, held in enumerate(value) if (said := _odd(held, _under(name, number)))), "")
    return ""


def _under(name: str, key: Any) -> str:
    return f"{name}[{key!r}]" if name else repr(key) if isinstance(key, str) else f"entry {key}"
