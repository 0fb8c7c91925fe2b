"""Estimands: which quantity of mediation analysis is asked for, as algebra over passes.

With x the base run, x' the source run and M a mediator. A new estimand is one row of `ESTIMANDS`; the engine runs the union of the passes
that are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxmed.errors import UserError, unknown

PASSES = {
    "total": "y(source) - y(base), from the two full forwards",
    "into-base": "y(base; M := M(source)) - y(base), one restarted run per unit",
    "into-source": "y(source; M := M(base)) - y(source), one restarted run per unit of the turned contrast",
}
"""What can be run, each as a difference of like with like."""
Found = Mapping[str, np.ndarray]
"""Pass -> float32 [outcome, units]; "total" [outcome, 1]."""


@dataclass(frozen=True)
class Estimand:
    """A quantity.

    Attributes:
        needs: keys of `PASSES`.
        combine: passes -> values [outcome, units].
        formula: in words of the legend.
    """

    needs: frozenset[str]
    combine: Callable[[Found], np.ndarray]
    formula: str


def _indirect(found: Found) -> np.ndarray:
    return found["into-base"]


def _direct(found: Found) -> np.ndarray:
    return found["total"] + found["into-source"]


def _total(found: Found) -> np.ndarray:
    return np.broadcast_to(found["total"], found["into-base"].shape)


def _interaction(found: Found) -> np.ndarray:
    return -found["into-source"] - found["into-base"]


ESTIMANDS: dict[str, Estimand] = {
    "indirect": Estimand(frozenset({"into-base"}), _indirect, "natural indirect effect: y(base; M := M(source)) - y(base)"),
    "direct": Estimand(frozenset({"total", "into-source"}), _direct, "natural direct effect: y(source; M := M(base)) - y(base)"),
    "total": Estimand(frozenset({"total", "into-base"}), _total, "total effect: y(source) - y(base)"),
    "interaction": Estimand(frozenset({"into-base", "into-source"}), _interaction, "total - direct - indirect"),
}


def check_estimands(estimands: tuple[str, ...]) -> tuple[str, ...]:
    """The estimands in the order of the table; a UserError with the nearest names where one is unknown."""
    for name in estimands:
        if name not in ESTIMANDS:
            raise unknown("estimand", name, ESTIMANDS)
    if not estimands:
        raise UserError(f"Give at least one estimand of: {', '.join(ESTIMANDS)}.")
    return tuple(name for name in ESTIMANDS if name in estimands)


def variable(unit: str, estimand: str) -> str:
    """The name of a unit's values in the result table."""
    return unit if estimand == "indirect" else f"{unit}_{estimand}"
