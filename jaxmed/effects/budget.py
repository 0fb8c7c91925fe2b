"""Budgets of screened sweeps: a part of what all exact effects would take, FLOPs, or seconds."""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxmed.errors import UserError

_FORM = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(%|s|m|h|flops?)\s*", re.IGNORECASE)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_LEGAL = 'Give a part of the exact effects\' FLOPs ("2%"), FLOPs of the whole sweep ("3e13 flop"), or its time ("90s", "20m", "2h").'


def read_budget(text: str) -> tuple[float, str]:
    """A budget as (number, unit), the unit one of "%", "s" and "flop".

    Raises:
        UserError: no such form, or a number that is not positive.
    """
    found = _FORM.fullmatch(str(text))
    try:
        number, unit = (float(found[1]), found[2].lower()) if found else (0.0, "")
    except ValueError:  # "1.2.3"
        number, unit = 0.0, ""
    if not 0 < number < float("inf") or (unit == "%" and number > 100):
        raise UserError(f"--budget {text!r} is not understood. {_LEGAL}")
    if unit in _SECONDS:
        return number * _SECONDS[unit], "s"
    return number, "%" if unit == "%" else "flop"


def budget_part(text: str, every: float, rate: Callable[[], float]) -> float:
    """A budget as a part, at most 1, of the FLOPs of all exact effects.

    Args:
        every: these FLOPs, of the units that are screened.
        rate: measures this machine's FLOP/s; called for budgets of time alone.
    """
    number, unit = read_budget(text)
    if unit == "%":
        return number / 100
    flops = number * rate() if unit == "s" else number
    return min(1.0, flops / every) if every else 1.0
