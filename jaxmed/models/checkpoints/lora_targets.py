"""Which modules PEFT makes adapters of, by the settings of an adapter; tensors of others are in its file for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import regex

from jaxmed.errors import UserError, quoted

SECONDS = 1.0
"""How long one pattern of an adapter may be matched against one name: a pattern can be written to take years."""


def matches(pattern: str, text: str, whole: bool = False) -> Any:
    """The match of a pattern at the start of a text, or with the whole of it; None where there is none.

    Raises:
        UserError: no regular expression, or one that takes longer than `SECONDS`.
    """
    try:
        return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=SECONDS)
    except TimeoutError:
        raise UserError(f"The pattern {quoted(pattern)} of the adapter takes more than {SECONDS:.0f} s against {quoted(text)}.") from None
    except (regex.error, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{quoted(pattern)} is no regular expression: {error}") from None


def is_wrapped(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether PEFT makes an adapter of a module (its name without `base_model.model.`), by `exclude_modules`, `target_modules`,
    `layers_to_transform` and `layers_pattern`.

    Raises:
        ValueError: a setting that cannot be used.
    """
    excluded, targets = settings.get("exclude_modules"), settings.get("target_modules")
    if excluded and _names(module, excluded):
        return False
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return bool(matches(targets, module, whole=True))
    layers = settings.get("layers_to_transform")
    if module in _listed(targets, str) or layers is None or layers == []:
        return _names(module, targets)
    return _names(module, targets) and _layer(module, settings.get("layers_pattern")) in _listed(layers, int)


def _names(module: str, names: Any) -> bool:
    if isinstance(names, str):
        return bool(matches(names, module, whole=True))
    return any(module == name or module.endswith("." + name) for name in _listed(names, str))


def _layer(module: str, patterns: Any) -> int | None:
    """The number of the layer that a module is in."""
    spelled = [r"[^.]*"] if not patterns else [patterns] if isinstance(patterns, str) else _listed(patterns, str)
    found = (matches(rf".*\.{pattern}\.(\d+)\.", module) for pattern in spelled)
    return next((int(match[match.re.groups]) for match in found if match), None)


def _listed(values: Any, kind: type) -> list[Any]:
    listed = values if isinstance(values, list) else [values]
    if not all(type(value) is kind for value in listed):
        raise ValueError(f"{quoted(values)} is no list of {kind.__name__}")
    return listed
