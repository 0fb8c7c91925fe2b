"""How much masks have in common, against chance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.pruning.masks import Mask, check_same_matrices


@dataclass(frozen=True)
class Overlap:
    """How much two masks share.

    Attributes:
        both, either: weights in both masks and in at least one.
        by_chance: weights in both if each matrix's were drawn at random, with the same counts per matrix.
        stratified: the same with draws within `STRATA` equal parts of each matrix by |W|; None without weights.
    """

    both: int
    either: int
    by_chance: float
    stratified: float | None = None

    @property
    def jaccard(self) -> float:
        return self.both / self.either if self.either else 0.0


STRATA = 20


def overlap(one: Mask, other: Mask, weights: Iterable[tuple[str, Any]] | None = None) -> Overlap:
    """Counts what two masks share, against chance.

    Large weights have large scores under most rules, so plain chance is nearly always exceeded: compare with masks of control
    behaviours too.

    Args:
        weights: (matrix, weights) pairs, for the stratified count; they are taken one by one.

    Raises:
        UserError: masks of different matrices.
    """
    check_same_matrices(one, other)
    both = sum(len(np.intersect1d(one.indices[name], other.indices[name], assume_unique=True)) for name in one.indices)
    mine, theirs = one.counts(), other.counts()
    chance = sum(mine[name] * theirs[name] / int(np.prod(one.shapes[name])) for name in mine)
    stratified = None
    if weights is not None:
        stratified = 0.0
        for name, values in weights:
            sizes, stratum = _strata(np.abs(np.asarray(values, np.float32)).ravel())
            counted = [np.bincount(stratum[mask.indices[name]], minlength=STRATA) for mask in (one, other)]
            stratified += float((counted[0] * counted[1] / np.maximum(sizes, 1)).sum())
    return Overlap(both, one.count + other.count - both, chance, stratified)


def _strata(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many values each of `STRATA` equal parts by rank has, and every value's part, uint8; equal values by their index."""
    order, edges = np.argsort(values, kind="stable"), -(-np.arange(STRATA + 1) * len(values) // STRATA)
    stratum = np.empty(len(values), np.uint8)
    for number in range(STRATA):
        stratum[order[edges[number] : edges[number + 1]]] = number
    return np.diff(edges), stratum
