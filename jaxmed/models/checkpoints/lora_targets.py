"""Which modules PEFT makes adapters of, by the settings of an adapter; tensors of others are in its file for nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import regex

from jaxmed.errors import UserError, quoted

SECONDS, IN_ALL = 1.0, 10.0
"""How long one pattern of an adapter may be matched against one name, and all of its patterns against all names: a pattern can be
written to take years, and many can be written that take just less than one may."""
LETTERS = 20_000
"""Of the longest pattern: the limits of time do not hold while a pattern is read."""


class Patterns:
    """The regular expressions of one adapter, and the seconds that are left for them."""

    def __init__(self) -> None:
        self.left = IN_ALL

    def match(self, pattern: str, text: str, whole: bool = False) -> Any:
        """The match of a pattern at the start of a text, or with the whole of it; None where there is none.

        Raises:
            UserError: one that takes longer than `SECONDS`, or all of them longer than `IN_ALL`.
            ValueError: no regular expression.
        """
        if len(pattern) > LETTERS:
            raise ValueError(f"{quoted(pattern[:100])}... is a pattern of {len(pattern):,} letters; at most {LETTERS:,} are read")
        begun = time.thread_time()
        try:
            return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=SECONDS)
        except TimeoutError:
            raise UserError(
                f"The pattern {quoted(pattern)} of the adapter takes more than {SECONDS:.0f} s against {quoted(text)}."
            ) from None
        except (regex.error, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{quoted(pattern)} is no regular expression: {error}") from None
        finally:
            self.left -= time.thread_time() - begun
            if self.left < 0:
                raise UserError(f"The patterns of the adapter take more than {IN_ALL:.0f} s together; one is {quoted(pattern)}.")


def is_wrapped(module: str, settings: Mapping[str, Any], patterns: Patterns) -> bool:
    """Whether PEFT makes an adapter of a module (its name without `base_model.model.`), by `exclude_modules`, `target_modules`,
    `layers_to_transform` and `layers_pattern`.

    Raises:
        ValueError: a setting that cannot be used.
    """
    excluded, targets = settings.get("exclude_modules"), settings.get("target_modules")
    if excluded and _names(module, excluded, patterns):
        return False
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return bool(patterns.match(targets, module, whole=True))
    layers = settings.get("layers_to_transform")
    if module in _listed(targets, str) or layers is None or layers == []:
        return _names(module, targets, patterns)
    return _names(module, targets, patterns) and _layer(module, settings.get("layers_pattern"), patterns) in _listed(layers, int)


def _names(module: str, names: Any, patterns: Patterns) -> bool:
    if isinstance(names, str):
        return bool(patterns.match(names, module, whole=True))
    return any(module == name or module.endswith("." + name) for name in _listed(names, str))


def _layer(module: str, names: Any, patterns: Patterns) -> int | None:
    """The number of the layer that a module is in."""
    spelled = [r"[^.]*"] if not names else [names] if isinstance(names, str) else _listed(names, str)
    found = (patterns.match(rf".*\.{pattern}\.(\d+)\.", module) for pattern in spelled)
    return next((int(match[match.re.groups]) for match in found if match), None)


def _listed(values: Any, kind: type) -> list[Any]:
    listed = values if isinstance(values, list) else [values]
    if not all(type(value) is kind for value in listed):
        raise ValueError(f"{quoted(values)} is no list of {kind.__name__}")
    return listed
