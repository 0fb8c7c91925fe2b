"""Methods: whether effects are computed or estimated, and how. A new estimate of the first order is one row of `METHODS`.

What runs them is in `estimators`; what a reader must be told of them is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.effects.grad_drop import GRADDROP
from jaxmed.effects.outcomes import OUTCOMES, OutcomeName, outcome_name
from jaxmed.errors import UserError, unknown
from jaxmed.models.rules import EXACT, RELP, Rules


@dataclass(frozen=True)
class Method:
    """How effects come about.

    Attributes:
        values: what the table holds, in words: "exact effects".
        told: how they come about, in words of the legend.
        passes: what its passes are.
        rows: what chunk sizes count.
        rules: how blocks are linearised; None where nothing is.
        screened: estimates say which effects are computed.
        at_base: estimates rest on what happens near the base run, and need outcomes whose gradient there says something.
        beside: further variables of every unit: the ending of the name, and what it is in words.
        both_ends: what is written is what the source run has.
    """

    values: str
    told: str
    passes: str = "forwards and backwards"
    rows: str = "pairs per batch"
    rules: Rules | None = None
    screened: bool = False
    at_base: bool = True
    beside: tuple[tuple[str, str], ...] = ()
    both_ends: bool = False

    @property
    def exact(self) -> bool:
        """Whether effects are computed and not estimated."""
        return self.rules is None

    @property
    def restarts(self) -> bool:
        """Whether there are restarted runs, each beside a base row."""
        return self.exact or self.screened


_CHANGE = "the unit's change times the gradient of the outcome at the base run, summed over its elements and the patched tokens"

METHODS: dict[str, Method] = {
    "exact": Method("exact effects", "a restarted run of every unit", "restarted passes", "rows per device and chunk"),
    "attribution": Method("first-order estimates", f"attribution patching (Nanda 2023; Kramár et al. 2024): {_CHANGE}", rules=EXACT),
    "attribution-star": Method(
        "first-order estimates",
        f"attribution patching (Kramár et al. 2024): {_CHANGE}; beside it the mean of its absolute values over backwards that skip a layer",
        rules=EXACT,
        beside=((GRADDROP, "mean of absolute first-order effects over backwards that skip another layer each (GradDrop); it has no sign"),),
    ),
    "relp": Method(
        "first-order estimates",
        f"relevance patching (Jafari et al. 2025): {_CHANGE}; the gradient holds norms and attention patterns constant, takes activations "
        "as multiples of their inputs, and halves products",
        rules=RELP,
    ),
    "mean-gradient": Method(
        "first-order estimates",
        "the unit's change times the mean of the outcome's gradients at the base run and at the source run",
        rules=EXACT,
        both_ends=True,
    ),
    "integrated": Method(
        "integrated-gradients estimates",
        "integrated gradients (Sundararajan et al. 2017): the unit's change times the mean gradient of the outcome while all units of "
        "its kind and layer go from base to source together, at the same tokens, all else being as in the base run",
        rules=EXACT,
        at_base=False,
    ),
    "screened": Method(
        "screened effects",
        f"attribution patching of all units: {_CHANGE}; then restarted runs of those that are likeliest to be among the largest, and of a "
        "sample of the others, which shows how far estimates are off. Means and tests use the difference estimator, which is unbiased",
        passes="forwards, backwards and restarted passes",
        rows="rows per device and chunk",
        rules=EXACT,
        screened=True,
    ),
}


def find_method(method: str) -> Method:
    """The method of a name; a UserError with the nearest names where there is none."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]


def check_method(method: str, outcomes: Sequence[OutcomeName], estimands: Sequence[str], together: bool, vocabulary: int) -> None:
    """Refuses what an estimate cannot be made of.

    Args:
        together: whether there are sets or paths.
        vocabulary: of the model.

    Raises:
        UserError: an unknown method; with an estimate: sets, paths, estimands other than the indirect effect, outcomes without a
            derivative.
    """
    if find_method(method).exact:
        return
    asked = f"--method {method}"
    if together:
        raise UserError(f"{asked} estimates single units. Sets and paths are computed: use --method exact for them.")
    if other := [name for name in estimands if name != "indirect"]:
        raise UserError(f"{asked} estimates indirect effects; {other[0]!r} is computed: use --method exact for it.")
    for outcome in outcomes:
        _check_outcome(outcome, asked, METHODS[method].at_base, vocabulary)


def _check_outcome(outcome: OutcomeName, asked: str, at_base: bool, vocabulary: int) -> None:
    name = outcome_name(outcome)
    if not callable(outcome):
        if at_base and not OUTCOMES[outcome].differentiable:
            legal = ", ".join(name for name, one in OUTCOMES.items() if one.differentiable)
            raise UserError(f"{asked} does not take {name!r}. {_ALONG} {legal}.")
        return
    problem = _without_gradient(outcome, vocabulary)
    if problem:
        raise UserError(f"{asked} needs the gradient of the outcome, and {name} {problem}. {_USE} one that is smooth in the logits.")


_ALONG = "Use --method integrated or --method exact, or another outcome:"
_USE = "Use --method exact, or another outcome:"
_DRAWS = 3


def _without_gradient(outcome: Callable[[jax.Array], jax.Array], vocabulary: int) -> str:
    """Why a function of logits has no gradient to go by; "" where it has one."""
    logits = np.random.default_rng(0).normal(size=(_DRAWS, vocabulary)).astype(np.float32)
    try:
        found = jax.jit(jax.vmap(jax.grad(outcome)))(jnp.asarray(logits))
    except Exception as error:  # whatever JAX or a user's function raises
        return f"cannot be differentiated ({type(error).__name__})"
    if not np.isfinite(np.asarray(found)).all():
        return "has one that is not finite"
    return "" if np.asarray(found).any() else "has none but zero"
