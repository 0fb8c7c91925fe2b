"""Whether a mask's weights sit at the units that mediate: ratios to what is expected, permutation tests over units, correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

from jaxmed.bridge.mediators import UNITS, Effects, single_effects, strongest
from jaxmed.bridge.tally import Tally, random_alike, tally
from jaxmed.models.model import Model
from jaxmed.models.named_weights import weights_by_name
from jaxmed.pruning.apply import check_mask
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.scores import Scores
from jaxmed.pruning.selection import random_like
from jaxmed.statistics import mean_interval, ratio_interval

BINS, PER_BIN = 8, 16
"""Units are exchanged within parts of a layer by the size of their weights: at most `BINS`, with `PER_BIN` units or more."""
BEHAVIOUR, RANDOM, ALIKE = "behaviour", "random", "random of like size"


@dataclass(frozen=True)
class Counting:
    """How units are counted and tested: mediating units of a layer, draws of the permutation test, seed of random masks and draws."""

    top: int = 32
    permutations: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Scope:
    """Units whose weights are counted together.

    Attributes:
        name: in tables.
        mediates: bool [U].
        block: int [U], units that may be exchanged: of one layer and like size.
        removed, by_norms: float [masks, U], and
        by_counts: float [U], as in `Tally`.
    """

    name: str
    mediates: np.ndarray
    block: np.ndarray
    removed: np.ndarray
    by_counts: np.ndarray
    by_norms: np.ndarray


def make_scope(name: str, tallies: Sequence[Tally], mediators: Mapping[tuple[str, int], np.ndarray]) -> Scope:
    """The units of several layers in one scope."""
    marks, blocks, first = [], [], 0
    for one in tallies:
        units = len(one.norm)
        marks.append(np.isin(np.arange(units), mediators[one.kind, one.layer]))
        bins = max(1, min(BINS, units // PER_BIN))
        blocks.append(first + np.argsort(np.argsort(one.norm, kind="stable")) * bins // units)
        first += bins
    joined = (np.concatenate([getattr(one, field) for one in tallies], axis=-1) for field in ("removed", "by_counts", "by_norms"))
    return Scope(name, np.concatenate(marks), np.concatenate(blocks), *joined)


def permutation_p(excess: np.ndarray, mediates: np.ndarray, block: np.ndarray, permutations: int, seed: int) -> float:
    """One-sided p of the summed excess [U] at mediating units, where these change places with others of their block."""
    rng, reached = np.random.default_rng(seed), np.zeros(permutations)
    for number in np.unique(block[mediates]):
        here = np.flatnonzero(block == number)
        count = int(mediates[here].sum())
        order = np.argpartition(rng.random((permutations, len(here))), count - 1, axis=1)[:, :count]
        reached += excess[here][order].sum(axis=1)
    observed = float(excess[mediates].sum())
    slack = 1e-9 * max(1.0, float(np.abs(excess).sum()))
    return float((1 + (reached >= observed - slack).sum()) / (1 + permutations))


def _ratio(removed: np.ndarray, expected: np.ndarray) -> tuple[float, float, float]:
    """Removed over expected weights of mediating units [k], with an interval: the wider of the one over units and the exact Poisson one,
    since few weights at few units vary less than they would. Units that no weight is expected of say nothing."""
    removed, expected = removed[expected > 0], expected[expected > 0]
    if not len(expected):
        return math.nan, math.nan, math.nan
    ratio, low, high = ratio_interval(removed, expected)
    if math.isnan(low):
        return ratio, low, high
    count, whole = float(removed.sum()), float(expected.sum())
    least = float(stats.chi2.ppf(0.025, 2 * count)) / 2 if count else 0.0
    most = float(stats.chi2.ppf(0.975, 2 * (count + 1))) / 2
    return ratio, max(0.0, min(low, least / whole)), max(high, most / whole)


def _odds(part: float, of: float, expected: float) -> float:
    """Odds ratio of being at a mediating unit, removed against expected weights."""
    below = (of - part) * expected
    return part * (of - expected) / below if below else math.nan


def enrichment_row(scope: Scope, at: int, name: str, permutations: int, seed: int) -> dict[str, Any]:
    """A row of enrichment.csv: one mask in one scope."""
    own, counts, norms = scope.removed[at], scope.by_counts, scope.by_norms[at]
    here, removed = scope.mediates, float(own.sum())
    found = {"scope": scope.name, "mask": name, "units": len(own), "mediating": int(here.sum()), "removed": removed}
    found |= {"at_mediators": float(own[here].sum()), "share": float(own[here].sum()) / removed if removed else math.nan}
    for which, expected in (("counts", counts), ("norms", norms)):
        ratio, low, high = _ratio(own[here], expected[here])
        part = float(expected[here].sum())
        found |= {f"expected_by_{which}": part, f"ratio_by_{which}": ratio, f"{which}_low": low, f"{which}_high": high}
        found[f"odds_by_{which}"] = _odds(float(own[here].sum()), removed, part)
    return {**found, "p": permutation_p(own - norms, here, scope.block, permutations, seed)}


def against_controls(scope: Scope, controls: Sequence[int], permutations: int, seed: int) -> dict[str, Any]:
    """How much more the first mask's ratio is than the mean one of control behaviours, as a row's further columns."""
    if not controls:
        return {}
    here, excess = scope.mediates, scope.removed - scope.by_norms
    expected = scope.by_norms[:, here].mean(axis=1, keepdims=True)
    own = scope.removed[:, here]
    parts = np.divide(own, expected, out=np.full_like(own, np.nan), where=expected > 0)
    more = parts[0] - parts[list(controls)].mean(axis=0)
    low, high = mean_interval(more)
    p = permutation_p(excess[0] - excess[list(controls)].mean(axis=0), here, scope.block, permutations, seed)
    return {"more_than_controls": float(more.mean()), "more_low": float(low), "more_high": float(high), "p_more": p}


def correlation_row(tallies: Sequence[Tally], effects: Effects) -> dict[str, Any]:
    """A row of correlations.csv: Spearman's rank correlations over units of one kind between |effect| and what is removed of each."""
    size = np.abs(np.concatenate([effects[one.kind, one.layer] for one in tallies]))
    removed, expected = (np.concatenate([getattr(one, name)[0] for one in tallies]) for name in ("removed", "by_norms"))
    score, norm = (np.concatenate([getattr(one, name) for one in tallies]) for name in ("score", "norm"))
    layer = tallies[0].layer if len(tallies) == 1 else "all"
    found = {"unit": tallies[0].kind, "layer": layer, "units": len(size), "removed": float(removed.sum())}
    for name, values in {"removed": removed, "excess": removed - expected, "score": score, "norm": norm}.items():
        known = np.isfinite(values).all() and np.ptp(values) > 0 and np.ptp(size) > 0
        test: Any = stats.spearmanr(size, values) if known else None
        found |= {f"{name}_rho": math.nan if test is None else float(test.statistic)}
        found |= {f"{name}_p": math.nan if test is None else float(test.pvalue)}
    return found


class Enriched(NamedTuple):
    """What `enrichment` finds.

    Attributes:
        rows: one per scope and mask: weights at mediating units against what is expected by counts and by norms; see `Scope`.
        correlations: one per layer of neurons, and one of all heads.
        units: one per unit: layer, index, effect, whether it mediates, weights removed by every mask, expected ones, norm.
    """

    rows: tuple[dict[str, Any], ...]
    correlations: tuple[dict[str, Any], ...]
    units: tuple[dict[str, Any], ...]


def enrichment(
    model: Model,
    effects: xr.Dataset | Sequence[xr.Dataset],
    mask: Mask,
    controls: Mapping[str, Mask] | None = None,
    *,
    top: int = 32,
    scores: Scores | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> Enriched:
    """Whether the weights of a mask sit at the units that mediate.

    Mediating units are the `top` neurons of each layer, and the `top` heads of all layers (an eighth of them at most), by their mean
    effects in the direction of the total. Their share of the mask's weights is set against that of as many random weights per matrix, of
    as many weights as large (in strata of |W|), of the masks of control behaviours scaled to the same counts per matrix, and of random
    masks. p is that of a one-sided permutation test: mediating units change places with others of their layer whose weights are of like
    size.

    Args:
        effects: tables of sweeps with single neurons or heads, such as those of `jm.sweep` and `jm.open_results`.
        mask, controls: of the weights of `model`; name -> mask of a control behaviour.
        scores: what the mask was selected by, for the summed |score| of every unit.

    Raises:
        UserError: a table without such units; a mask of other weights than the model's.
    """
    tables = [effects] if isinstance(effects, xr.Dataset) else list(effects)
    for one in (mask, *(controls or {}).values()):
        check_mask(model, one)
    found = {place: one for table in tables for place, one in single_effects(table).items()}
    return enriched(model, found, mask, controls or {}, Counting(top, permutations, seed), scores)


def enriched(
    model: Model, effects: Effects, mask: Mask, controls: Mapping[str, Mask], how: Counting, scores: Scores | None = None
) -> Enriched:
    """`enrichment` of mean effects."""
    weights, seed = weights_by_name(model), how.seed
    others = {**controls, RANDOM: random_like(mask, seed), ALIKE: random_alike(mask, weights, seed)}
    names, masks = [BEHAVIOUR, *others], [mask, *others.values()]
    kinds = [kind for kind in UNITS if any(one == kind for one, _ in effects)]
    layers = {kind: tuple(sorted(layer for one, layer in effects if one == kind)) for kind in kinds}
    tallies, mediators = tally(model.config, weights, masks, layers, scores), strongest(effects, how.top)
    rows = []
    for scope in _scopes(tallies, mediators):
        more = against_controls(scope, range(1, 1 + len(controls)), how.permutations, seed)
        own = [enrichment_row(scope, at, name, how.permutations, seed) for at, name in enumerate(names)]
        rows += [{**own[0], **more}, *own[1:]]
    heads = [one for one in tallies if one.kind != "neuron"]
    together = [*([one] for one in tallies if one.kind == "neuron"), *([heads] if heads else [])]
    correlations = [correlation_row(part, effects) for part in together]
    units = [line for one in tallies for line in _unit_rows(one, effects[one.kind, one.layer], mediators[one.kind, one.layer], names)]
    return Enriched(tuple(rows), tuple(correlations), tuple(units))


def _scopes(tallies: Sequence[Tally], mediators: Mapping[tuple[str, int], np.ndarray]) -> list[Scope]:
    """Each kind of unit in all its layers; of neurons, each layer too."""
    found = []
    for kind, name in UNITS.items():
        own = [one for one in tallies if one.kind == kind]
        found += [make_scope(f"{name} of layer {one.layer}", [one], mediators) for one in own] if kind == "neuron" else []
        found += [make_scope(f"all {name}" if kind == "neuron" else name, own, mediators)] if len(own) > 1 else []
    return found


def _unit_rows(one: Tally, effects: np.ndarray, mediators: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    marked = np.isin(np.arange(len(effects)), mediators)
    return [
        {"unit": one.kind, "layer": one.layer, "index": at, "effect": float(effects[at]), "mediates": int(marked[at])}
        | {f"removed_{name}": float(one.removed[number, at]) for number, name in enumerate(names)}
        | {"by_counts": float(one.by_counts[at]), "by_norms": float(one.by_norms[0, at])}
        | {"score": float(one.score[at]), "norm": float(one.norm[at])}
        for at in range(len(effects))
    ]
