"""Estimators: what runs each method. A new one is a row here and a row of `methods.METHODS`; an estimate of first order is the latter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxmed.effects.estimates import FirstOrder
from jaxmed.effects.exact import Exact
from jaxmed.effects.integrated import Integrated
from jaxmed.effects.mean_gradient import MeanGradient
from jaxmed.effects.methods import METHODS, find_method
from jaxmed.effects.screened import Screened
from jaxmed.effects.work import Estimator
from jaxmed.models.rules import Rules

_WAYS: dict[str, Callable[[Rules], Estimator]] = {
    "attribution-star": partial(FirstOrder, drops=True),
    "mean-gradient": MeanGradient,
    "integrated": Integrated,
    "screened": Screened,
}
"""Methods that are more than change times gradient at the base run."""
ESTIMATORS: dict[str, Estimator] = {
    "exact": Exact(),
    **{name: _WAYS.get(name, FirstOrder)(one.rules) for name, one in METHODS.items() if one.rules is not None},
}


def find_estimator(method: str) -> Estimator:
    """The estimator of a name; a UserError with the nearest names where there is none."""
    find_method(method)
    return ESTIMATORS[method]
