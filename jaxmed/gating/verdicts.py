"""Claims about a layer's neurons, each with an estimate, its interval, and a verdict that says why.

A verdict needs more than a small p: with exact patching nearly every unit differs from zero, so an effect must also be a noticeable part of
the total.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from jaxmed.statistics import FEWEST_FOR_INTERVAL, mean_interval, ratio_interval

Curve = dict[int, np.ndarray]
"""How many neurons -> effects [groups]."""
NOTICED = 0.05
"""Part of the total below which an effect is not spoken of."""
SPARSE = 0.05
"""Part of a layer's neurons above which a group is not called small, and"""
FEW = 4
"""a number that is small in any layer."""
GATE = 0.5
"""Gating index that tells a gate from what merely adds."""
LEVEL = 0.05
SUPPORTED, NOT_SUPPORTED, UNDECIDED, ABSENT = "supported", "not supported", "undecided", "behaviour absent in this model"
DESCRIBED = "described"


@dataclass(frozen=True)
class Verdict:
    """An answer.

    Attributes:
        claim: what is claimed.
        verdict: "supported" where the numbers show it, "not supported" where they show the contrary, "undecided" where they allow both;
            "behaviour absent in this model"; or "described" where nothing is tested.
        unit: what the numbers are.
        why: in words.
        estimate, low, high: with a 95 % interval; NaN where there is none.
        p: of a test, where there is one.
    """

    claim: str
    verdict: str
    unit: str
    why: str
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def _few(groups: int) -> str:
    return f"{groups} groups are too few for an interval (at least {FEWEST_FOR_INTERVAL})"


def is_seen(effect: np.ndarray, total: np.ndarray) -> bool | None:
    """Whether an effect [groups] is a noticeable part of the total, in either direction; None where groups are too few to say."""
    low, high = mean_interval(effect)
    if math.isnan(low):
        return None
    mean_total = abs(float(total.mean()))
    return bool((low > 0 or high < 0) and abs(float(effect.mean())) >= NOTICED * mean_total > 0)


def whole_layer(layer: int, whole: np.ndarray, total: np.ndarray) -> Verdict:
    """Whether the layer's MLP carries part of the effect."""
    make, seen = partial(Verdict, f"the MLP of layer {layer} carries part of the effect", unit="share of the total"), is_seen(total, total)
    if seen is None:
        return make(UNDECIDED, why=_few(len(total)), estimate=float(whole.mean() / total.mean()) if total.mean() else math.nan)
    if not seen:
        return make(ABSENT, why="base and source do not differ on this outcome: the interval of the total holds zero")
    share, low, high = ratio_interval(whole, total)
    answer, why = UNDECIDED, "the interval holds zero, or what does not count"
    if low > 0 and share >= NOTICED:
        answer, why = SUPPORTED, f"at least {NOTICED:.0%} of the total, and the interval is above 0"
    elif high < NOTICED:
        answer, why = NOT_SUPPORTED, f"less than {NOTICED:.0%} of the total"
    return make(answer, why=why, estimate=share, low=low, high=high)


def smallest(curve: Curve, whole: np.ndarray, part: float) -> int | None:
    """The smallest group whose mean effect is `part` of the whole, and that of every larger group too; None where the whole is zero."""
    reached = [k for k in sorted(curve) if float(curve[k].mean()) / float(whole.mean() or math.nan) >= part]
    lasting = [k for k in reached if all(later in reached for later in curve if later > k)]
    return lasting[0] if lasting else None


def sufficiency(top: Curve, matched: Curve, whole: np.ndarray, neurons: int, part: float) -> tuple[Verdict, int | None]:
    """Whether a small group has most of the effect of the whole MLP, and random ones like it have not; and its size."""
    make = partial(Verdict, f"a small group of neurons has {part:.0%} of the effect of the layer's MLP", unit="neurons")
    k, seen = smallest(top, whole, part), is_seen(whole, whole)
    if not seen or k is None:
        why = "the layer's MLP has no effect to explain" if seen is False else _few(len(whole)) if seen is None else "no group has"
        return make(UNDECIDED, why=why, estimate=math.nan if k is None else k), k
    share, low, high = ratio_interval(top[k], whole)
    told = f"{k} of {neurons} neurons have {share:.0%} ({low:.0%} to {high:.0%}) on pairs that did not choose them"
    if k > max(FEW, SPARSE * neurons):
        return make(NOT_SUPPORTED, why=f"{told}: more than {SPARSE:.0%} of the layer", estimate=k), k
    random = matched.get(k, np.zeros_like(top[k]))
    more, _ = mean_interval((top[k] - random) * np.sign(whole.mean()))
    told += f"; as many random neurons of like size have {ratio_interval(random, whole)[0]:.0%}"
    return make(SUPPORTED if more > 0 else UNDECIDED, why=told, estimate=k), k


def gating(module: str, k: int | None, upstream: np.ndarray, held: Curve, matched: Curve, total: np.ndarray) -> Verdict:
    """Whether an upstream effect goes through the group: 1 - (effect with the group held at base) / (effect)."""
    make, seen = partial(Verdict, f"the group gates the effect of the {module}", unit="gating index"), is_seen(upstream, total)
    k = max(held) if k is None else k
    if not seen:
        why = "its effect is too small to be gated" if seen is False else _few(len(total))
        index = 1 - float(held[k].mean() / upstream.mean()) if seen is None and upstream.mean() else math.nan
        return make(UNDECIDED, why=why, estimate=index)
    left, low, high = ratio_interval(held[k], upstream)
    index, low, high = 1 - left, 1 - high, 1 - low
    told = f"with {k} neurons held at base, {left:.0%} of the effect is left"
    if k in matched:
        told += f"; with random ones of like size, {ratio_interval(matched[k], upstream)[0]:.0%}"
    answer = SUPPORTED if low > GATE else NOT_SUPPORTED if high < GATE else UNDECIDED
    return make(answer, why=told, estimate=index, low=low, high=high)


def gini(x: np.ndarray) -> float:
    """Gini coefficient of absolute values [F]: 0 where all are equal, near 1 where one has everything; NaN of zeros."""
    x = np.sort(np.abs(x))
    total = x.sum()
    return float((2 * np.arange(1, len(x) + 1) - len(x) - 1) @ x / (len(x) * total)) if total else math.nan


def participation(x: np.ndarray) -> float:
    """Participation ratio (sum x^2)^2 / sum x^4 of values [F]: how many neurons share the effect; NaN of zeros."""
    squares = np.square(x / (np.abs(x).max() or 1.0))
    return float(squares.sum() ** 2 / np.square(squares).sum()) if squares.any() else math.nan


def sparsity(here: np.ndarray, elsewhere: np.ndarray) -> Verdict:
    """How few neurons share the single effects [F], beside those of the control layer; a description, so without an answer of its own."""
    counts = [participation(x) for x in (here, elsewhere)]
    why = f"Gini {gini(here):.2f}; control layer: {counts[1]:.1f} neurons, Gini {gini(elsewhere):.2f}"
    return Verdict("single effects are spread over few neurons", DESCRIBED, "participation ratio, neurons", why, counts[0])


def adjacency(width: int, spreads: np.ndarray) -> Verdict:
    """Whether adjacent neurons do more together than random ones: a permutation test of the spread of window effects.

    Args:
        spreads: of adjacent neurons, then of every shuffled order.
    """
    p, mean = float((1 + (spreads[1:] >= spreads[0]).sum()) / len(spreads)), float(spreads[1:].mean())
    why = f"permutation test against {len(spreads) - 1} shuffled orders; smallest p {1 / len(spreads):.3f}"
    answer = SUPPORTED if p <= LEVEL else UNDECIDED
    unit, ratio = "spread of window effects over that of shuffled ones", float(spreads[0]) / mean if mean else math.nan
    return Verdict(f"windows of {width} adjacent neurons work together", answer, unit, why, ratio, p=p)
