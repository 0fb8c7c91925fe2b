"""Estimators: how effects are computed. A new method is one row of `ESTIMATORS`."""

from __future__ import annotations

from jaxmed.effects.exact import Exact
from jaxmed.effects.work import Estimator
from jaxmed.errors import unknown

ESTIMATORS: dict[str, Estimator] = {"exact": Exact()}


def find_estimator(method: str) -> Estimator:
    """The estimator of a name; a UserError with the nearest names where there is none."""
    if method not in ESTIMATORS:
        raise unknown("method", method, ESTIMATORS)
    return ESTIMATORS[method]
