"""Compression: how much fewer weights carry a behaviour in an aligned model than in its base, beside a control behaviour.

q50 is the rule's fraction q of chosen weights (before those that others need are spared) at which a behaviour is halved: at which the
geometric mean over examples of its responses' probability per token is half of the unpruned model's, so that the loss has risen by ln 2.
compression = log q50(base) - log q50(aligned),
minus the same of the control (methods: a positive number says that alignment has packed the behaviour into fewer weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.files import Row
from jaxmed.statistics import percentile_interval, resample_weights

COMPRESSION = "compression.csv"
HALVED = math.log(2)
"""Rise of the loss, in nats per token, at which a behaviour is halved."""


@dataclass(frozen=True)
class Curve:
    """One behaviour of one model, pruned more and more.

    Attributes:
        q: fractions of chosen weights, ascending; fraction: what was removed of all weights, the spared ones not counted.
        rises: rise of every example's loss [q, examples], in nats per token.
        ratio: perplexity over that of the unpruned model, [q].
    """

    q: np.ndarray
    rises: np.ndarray
    ratio: np.ndarray
    fraction: np.ndarray


def read_curve(rows: Sequence[Row], examples: Sequence[Row], name: str) -> Curve:
    """The curve of test set `name` from the tables of `prune curve`: the rule's own rows, without its baselines.

    Raises:
        UserError: a set that was not tested, or tables that do not belong together.
    """
    own = next((row["rule"] for row in rows if row["rule"] != "none"), None)
    held: dict[tuple[Any, float], dict[int, float]] = {}
    for row in examples:
        if row["set"] == name:
            held.setdefault((row["rule"], row["q"]), {})[int(row["example"])] = row["loss"]
    qs = sorted(row["q"] for row in rows if row["rule"] == own)
    wanted = [("none", 0.0), *((own, q) for q in qs)]
    if own is None or any(key not in held for key in wanted):
        tested = ", ".join(sorted({row["set"] for row in examples})) or "nothing"
        raise UserError(
            f"This curve has no losses of single examples of {name!r} (it has {tested}). Run `jaxmed prune curve` with --tests."
        )
    losses = np.array([[held[key][i] for i in sorted(held[key])] for key in wanted])
    of_rule = sorted((row for row in rows if row["rule"] == own), key=lambda row: row["q"])
    ratio, fraction = ([float(row.get(column, math.nan)) for row in of_rule] for column in ("perplexity_ratio", "fraction"))
    return Curve(np.array(qs), losses[1:] - losses[0], np.array(ratio), np.array(fraction))


def q50(curve: Curve, weights: np.ndarray | None = None) -> float:
    """Fraction q at which the mean rise first reaches `HALVED`, between the curve's on a logarithmic scale; infinite if it never does.

    Args:
        weights: how often each example counts (a resample); None: once.
    """
    mean = curve.rises.mean(1) if weights is None else curve.rises @ weights / weights.sum()
    above = np.nonzero(mean >= HALVED)[0]
    if not len(above):
        return math.inf
    at = int(above[0])
    if at == 0:
        return float(curve.q[0])
    part = (HALVED - mean[at - 1]) / (mean[at] - mean[at - 1])
    return float(np.exp(np.log(curve.q[at - 1]) + part * (np.log(curve.q[at]) - np.log(curve.q[at - 1]))))


def at_fraction(curve: Curve, values: np.ndarray, q: float) -> float:
    """A column of the curve (perplexity ratio, removed fraction) at q, between the curve's on logarithmic scales; NaN beyond them."""
    if not curve.q[0] <= q <= curve.q[-1]:
        return math.nan
    with np.errstate(divide="ignore"):
        return float(np.exp(np.interp(np.log(q), np.log(curve.q), np.log(values))))


def compression_rows(
    curves: Mapping[str, Mapping[str, Curve]], base: str, control: str, limit: float = 1.01, resamples: int = 2000, seed: int = 0
) -> list[Row]:
    """A row per model and behaviour: q50 with its 95 % interval, what it costs, and the compression against `base`.

    Args:
        curves: model -> behaviour -> curve.
        base: the model that the others are compared with.
        control: behaviour whose compression is subtracted; empty: none.
        limit: perplexity ratio up to which a q50 counts as reached without harm.

    Columns: `q50`, `q50_low`, `q50_high`; `reached`: "yes", "no", or "at most" where the curve's smallest q halves it already; what is
    removed and what it costs there: `fraction_at_q50`, `perplexity_at_q50`, `within_limit` (empty without perplexities);
    `compression` = log q50(base) - log q50(model), `net` =
    that minus the control's, `net_low`, `net_high`. Examples are resampled, the same ones in both models. What is never halved is
    infinite; a difference of two such is NaN, and an interval whose resamples are not all finite is NaN too.
    """
    rng = np.random.default_rng(seed)
    behaviours = list(next(iter(curves.values())))
    found: dict[tuple[str, str], np.ndarray] = {}
    for name in behaviours:
        counts = {curves[model][name].rises.shape[1] for model in curves}
        if len(counts) > 1:
            raise UserError(f"The curves of {name!r} have {sorted(counts)} examples; all models need the same ones.")
        size = counts.pop()
        draws = resample_weights(size, resamples, rng)
        for model in curves:
            found[model, name] = np.array([q50(curves[model][name]), *(q50(curves[model][name], draw) for draw in draws)])
    with np.errstate(invalid="ignore"):
        gains = {(model, name): np.log(found[base, name]) - np.log(found[model, name]) for model, name in found}
        rows = []
        for (model, name), values in found.items():
            curve = curves[model][name]
            low, high = percentile_interval(values[1:])
            reached = "no" if math.isinf(values[0]) else "at most" if values[0] == curve.q[0] else "yes"
            cost, fraction = (at_fraction(curve, column, values[0]) for column in (curve.ratio, curve.fraction))
            row: Row = {"model": model, "behaviour": name, "q50": values[0], "q50_low": 0.0 if reached == "at most" else low}
            row |= {"q50_high": high, "reached": reached, "fraction_at_q50": fraction, "perplexity_at_q50": cost}
            row |= {"within_limit": "" if np.isnan(curve.ratio).any() else int(cost <= limit)}
            net = gains[model, name] - gains[model, control] if control else gains[model, name]
            low, high = percentile_interval(net[1:]) if model != base else (math.nan, math.nan)
            row |= {"compression": gains[model, name][0], "net": net[0], "net_low": low, "net_high": high}
            rows.append(row)
    return rows
