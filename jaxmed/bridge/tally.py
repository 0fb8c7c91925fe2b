"""How many of a mask's weights every unit has, against what is expected of as many random weights, and of weights as large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxmed.bridge.owners import Owned, by_unit, owned_matrices, slot_count
from jaxmed.models.config import ModelConfig
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.scores import Scores

STRATA = 12
"""Strata of a matrix by |W|: its lower half, the next quarter, the next eighth, ...; large weights have large scores."""


@dataclass(frozen=True)
class Tally:
    """The units of one kind in one layer.

    Attributes:
        kind, layer: of the units.
        norm: float [U], root mean square of a unit's weights.
        removed: float [masks, U], weights of every mask; those of the others are scaled to the counts per matrix of the first one.
        by_counts: float [U], expected of as many random weights per matrix.
        by_norms: float [masks, U], expected of as many random weights per matrix and stratum of |W|.
        score: float [U], summed |score| of the first mask's weights; NaN without scores.
    """

    kind: str
    layer: int
    norm: np.ndarray
    removed: np.ndarray
    by_counts: np.ndarray
    by_norms: np.ndarray
    score: np.ndarray


def strata(sizes: np.ndarray) -> np.ndarray:
    """The stratum of every |W| [weights], int64 in 0 to `STRATA` - 1; equal values have one stratum."""
    count = len(sizes)
    places = sorted({count - (count >> power) for power in range(1, STRATA) if count >> power})
    return np.searchsorted(np.partition(sizes, places)[places], sizes, side="right") if places else np.zeros(count, np.int64)


def random_alike(mask: Mask, weights: Mapping[str, np.ndarray], seed: int) -> Mask:
    """A mask of the same counts per matrix and stratum of |W|, drawn at random."""
    rng, found = np.random.default_rng([seed, 1]), dict(mask.indices)
    for name, at in mask.indices.items():
        if not len(at):
            continue
        stratum = strata(np.abs(np.asarray(weights[name], np.float32)).ravel())
        drawn = np.bincount(stratum[at], minlength=STRATA)
        parts = [rng.choice(np.flatnonzero(stratum == one), drawn[one], replace=False) for one in np.flatnonzero(drawn)]
        found[name] = np.sort(np.concatenate(parts)).astype(np.int64)
    return replace(mask, indices=found, rule={"random_alike": dict(mask.rule), "seed": seed})


def tally(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    masks: Sequence[Mask],
    layers: dict[str, tuple[int, ...]],
    scores: Scores | None = None,
    kind: str = "behaviour_signed",
) -> list[Tally]:
    """What masks remove, unit by unit.

    Args:
        weights: matrix -> its values, read one at a time.
        masks: the one in question, then others that it is compared with.
        layers: kind of unit -> layers.
        scores: those that the first mask was chosen by, and
        kind: which.
    """
    parts: dict[tuple[str, int], list[np.ndarray]] = {}
    for owned in owned_matrices(config, layers):
        slots = slot_count(config, owned.kind)
        values = np.abs(np.asarray(weights[owned.name], np.float32)).ravel()
        marked = np.zeros(slots) if scores is None else _score(owned, slots, masks[0], scores.read(kind, owned.name).ravel())
        found = _count(owned, slots, values, [mask.indices[owned.name] for mask in masks])
        squares = np.bincount(owned.owner, values.astype(np.float64) ** 2, slots)
        own = np.vstack([found, marked, squares, np.bincount(owned.owner, minlength=slots)])
        parts.setdefault((owned.kind, owned.layer), []).append(by_unit(config, owned.kind, own))
    return [_joined(place, np.sum(rows, axis=0), len(masks), scores is not None) for place, rows in parts.items()]


def _joined(place: tuple[str, int], rows: np.ndarray, masks: int, scored: bool) -> Tally:
    removed, by_norms, by_counts, score, squares, sizes = np.split(rows, np.cumsum([masks, masks, 1, 1, 1]))
    marked = score[0] if scored else np.full_like(score[0], np.nan)
    return Tally(*place, np.sqrt(squares[0] / np.maximum(sizes[0], 1)), removed, by_counts[0], by_norms, marked)


def _score(owned: Owned, slots: int, mask: Mask, scores: np.ndarray) -> np.ndarray:
    at = mask.indices[owned.name]
    return np.bincount(owned.owner[at], np.abs(scores[at]).astype(np.float64), slots)


def _count(owned: Owned, slots: int, values: np.ndarray, indices: Sequence[np.ndarray]) -> np.ndarray:
    """Rows [slots]: removed by every mask, expected by norms of every mask, expected by counts."""
    stratum, size, wanted = strata(values), len(values), len(indices[0])
    of_strata = np.bincount(owned.owner.astype(np.int64) * STRATA + stratum, minlength=slots * STRATA).reshape(slots, STRATA)
    sizes, chance = of_strata.sum(axis=0), of_strata.sum(axis=1) * (wanted / size)
    removed, expected = [], []
    for at in indices:
        scale = wanted / len(at) if len(at) else 0.0
        drawn = np.bincount(stratum[at], minlength=STRATA)
        removed.append(scale * np.bincount(owned.owner[at], minlength=slots) if len(at) else chance)
        expected.append(scale * of_strata @ (drawn / np.maximum(sizes, 1)) if len(at) else chance)
    return np.vstack([*removed, *expected, chance])
