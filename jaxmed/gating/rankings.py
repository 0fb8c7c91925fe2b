"""Orders of a layer's neurons, the strongest first: by their effects, and by what others rank by. A new ranking is one row of `RANKINGS`.

Whatever a ranking says, what its first k neurons do together is computed exactly, on pairs that had no part in the ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxmed.axes import vocabulary_parts
from jaxmed.effects.contrast import Contrast
from jaxmed.effects.first_order import Base, estimate, run_base, run_source
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.pair_batches import PairRows, batch_rows, with_target
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Record
from jaxmed.models.model import Model
from jaxmed.models.rules import EXACT
from jaxmed.models.transformer import matrix_rows


@dataclass(frozen=True)
class Features:
    """What both runs of some pairs tell of a layer's neurons without any patch; values are means over the patched tokens of a pair.

    Attributes:
        base, source: float32 [P, F], values.
        attribution: float32 [P, F], first-order effects on the outcome.
        direction: float32 [P, D], source minus base of the residual stream behind the layer.
        written: float32 [F, D], what each neuron adds per unit of its value.
    """

    base: np.ndarray
    source: np.ndarray
    attribution: np.ndarray
    direction: np.ndarray
    written: np.ndarray

    @property
    def size(self) -> np.ndarray:
        """float64 [F], mean length of the vector by which a neuron changes the residual stream."""
        return np.abs(self.source - self.base).mean(axis=0) * np.linalg.norm(self.written, axis=1)

    def of(self, pairs: np.ndarray) -> Features:
        """Those of some pairs, by their numbers."""
        return Features(self.base[pairs], self.source[pairs], self.attribution[pairs], self.direction[pairs], self.written)


def measure_features(
    model: Model, contrasts: Sequence[Contrast], outcome: OutcomeName, layer: int, report: Callable[[int], None] = lambda done: None
) -> Features:
    """The features of a layer, from two forwards and a backward of each contrast; `report` is called after each."""
    readout, rows = Readout((outcome,), vocabulary_parts(model.mesh)), []
    for contrast in contrasts:
        pairs, there, here = _run_sides(contrast, readout)
        attribution = estimate(model.config, model.params, pairs, here, there, ("neuron",), 1, EXACT, layer)["neuron"][0, 0, 0, 0]
        slots = pairs.slots[0, 0, pairs.patched[0, 0]]
        base, source = ({site: record[site][layer, 0, slots].mean(axis=0) for site in SITES} for record in (here.record, there))
        found = (base["neuron"], source["neuron"], attribution, source["residual_out"] - base["residual_out"])
        rows.append([np.asarray(one, np.float32) for one in found])
        report(1)
    written = matrix_rows(model.config, model.params, "down", jnp.full(model.config.neurons, layer), jnp.arange(model.config.neurons))
    base, source, attribution, direction = (np.stack(column) for column in zip(*rows, strict=True))
    return Features(base, source, attribution, direction, np.asarray(written))


SITES = ("neuron", "residual_out")


def _run_sides(contrast: Contrast, readout: Readout) -> tuple[PairRows, Record, Base]:
    """Both runs of a contrast, a batch of one: what is fed, the source's values at SITES, and the base run."""
    pairs, (base, source) = batch_rows([contrast], 1), (contrast.base.model, contrast.source.model)
    there, _, target = run_source(source.config, source.params, pairs, SITES, readout)
    pairs = with_target(pairs, target)
    return pairs, there, run_base(base.config, base.params, pairs, SITES, readout)


@dataclass(frozen=True)
class Evidence:
    """What a ranking is made of, from discovery pairs alone.

    Attributes:
        effect: float64 [F], mean single effects, positive toward the source's outcome.
        sign: of the mean total.
        features: of the discovery pairs.
        seed: of random orders.
    """

    effect: np.ndarray
    sign: float
    features: Features
    seed: int


def _by_direction(evidence: Evidence) -> np.ndarray:
    features = evidence.features
    mean = features.direction.mean(axis=0)
    return (features.source - features.base).mean(axis=0) * (features.written @ (mean / max(float(np.linalg.norm(mean)), 1e-30)))


@dataclass(frozen=True)
class Ranking:
    """A way to rank: score [F] of the evidence, the highest first, and what it is, in words of the legend."""

    score: Callable[[Evidence], np.ndarray]
    told: str


RANKINGS: dict[str, Ranking] = {
    "effect": Ranking(lambda one: one.effect, "exact single effects, in the direction of the total"),
    "attribution": Ranking(
        lambda one: one.sign * one.features.attribution.mean(axis=0), "first-order effects: the change times the gradient at the base run"
    ),
    "direction": Ranking(
        _by_direction, "what a neuron's change adds along the mean difference of the residual streams behind the layer (refusal direction)"
    ),
    "activation": Ranking(
        lambda one: np.abs((one.features.source - one.features.base).mean(axis=0)), "contrastive: absolute mean change of the activation"
    ),
    "change": Ranking(
        lambda one: np.sqrt(((one.features.source - one.features.base) ** 2).mean(axis=0)),
        "root mean square change of the activation; between two models, the safety-neuron score (Chen et al. 2024, arXiv 2406.14144)",
    ),
    "norm": Ranking(lambda one: np.linalg.norm(one.features.written, axis=1), "length of the neuron's output vector"),
    "random": Ranking(lambda one: np.random.default_rng([one.seed, 1]).permutation(len(one.effect)), "a random order"),
}


def order(ranking: str, evidence: Evidence) -> np.ndarray:
    """Neuron indices [F] from the strongest to the weakest; ties by index."""
    return np.argsort(-np.asarray(RANKINGS[ranking].score(evidence), np.float64), kind="stable")


NEAREST = 16
"""Neurons among which a matched one is drawn."""


def matched(chosen: np.ndarray, size: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """As many other neurons [k], each drawn among those whose `size` is nearest to that of a chosen one, all different.

    Args:
        chosen: int [k], at most half of the neurons.
        size: [F], what is matched; see `Features.size`.
    """
    rng, free = np.random.default_rng(list(seed)), np.ones(len(size), bool)
    free[chosen] = False
    found = []
    for neuron in rng.permutation(chosen):
        left = np.flatnonzero(free)
        near = left[np.argsort(np.abs(size[left] - size[neuron]), kind="stable")[:NEAREST]]
        found.append(int(rng.choice(near)))
        free[found[-1]] = False
    return np.asarray(found)
