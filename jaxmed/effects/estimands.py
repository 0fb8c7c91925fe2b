"""Estimands: which quantity of mediation analysis is asked for, as algebra over passes.

With x the base run, x' the source run and M a mediator. A new estimand is one row of `ESTIMANDS`; the engine runs the union of the passes
that are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxmed.errors import UserError, unknown


@dataclass(frozen=True)
class Pass:
    """One restarted run per unit, as a difference of like with like.

    Attributes:
        turned: base and source change places.
        way: what of the model responds: "whole", all that comes later; "to-logits", nothing but the final norm and the unembedding;
            "via-later", all that comes later, while the unit's own vector is taken out of the last residual stream.
    """

    turned: bool
    way: str


PASSES: dict[str, Pass] = {
    "into-base": Pass(False, "whole"),
    "into-source": Pass(True, "whole"),
    "to-logits": Pass(False, "to-logits"),
    "via-later": Pass(False, "via-later"),
}
"""What can be run. The total effect is a pass of no unit: it comes of the two full forwards."""
Found = Mapping[str, np.ndarray]
"""Pass -> float32 [outcome, units, patches]; "total" [outcome, 1, 1]."""


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


def _to_logits(found: Found) -> np.ndarray:
    return found["to-logits"]


def _via_later(found: Found) -> np.ndarray:
    return found["via-later"]


def _both_ways(found: Found) -> np.ndarray:
    return found["into-base"] - found["to-logits"] - found["via-later"]


ESTIMANDS: dict[str, Estimand] = {
    "indirect": Estimand(frozenset({"into-base"}), _indirect, "natural indirect effect: y(base; M := M(source)) - y(base)"),
    "direct": Estimand(frozenset({"total", "into-source"}), _direct, "natural direct effect: y(source; M := M(base)) - y(base)"),
    "total": Estimand(frozenset({"total", "into-base"}), _total, "total effect: y(source) - y(base)"),
    "interaction": Estimand(frozenset({"into-base", "into-source"}), _interaction, "total - direct - indirect"),
    "to_logits": Estimand(
        frozenset({"to-logits"}), _to_logits, "the unit's vector added to the last residual stream alone: y(base; h + d) - y(base)"
    ),
    "via_later": Estimand(
        frozenset({"via-later"}), _via_later, "later layers respond, the unit's own vector taken out of the last residual stream"
    ),
    "both_ways": Estimand(frozenset({"into-base", "to-logits", "via-later"}), _both_ways, "indirect - to_logits - via_later"),
}
WHOLE = frozenset(name for name, one in ESTIMANDS.items() if all(PASSES[need].way == "whole" for need in one.needs - {"total"}))
"""Estimands that sets and paths have too."""


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
