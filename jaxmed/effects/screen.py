"""A pair while it is screened: what is known of its units, and which are computed next."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from jaxmed.effects.engine import PreparedContrast, Values, Window, open_window, unit_values
from jaxmed.effects.estimands import variable
from jaxmed.effects.job import BUDGET, SCREENED, Job
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.readout import Readout
from jaxmed.effects.shapes import row_flops, shapes_of
from jaxmed.effects.table import ERROR, ESTIMATE, PROBABILITY, RECALL, VERIFIED
from jaxmed.effects.work import Chunk, by_position, in_table, one_outcome
from jaxmed.statistics import screening

ERROR_PART = 0.9
"""The part of errors that the variable `<unit>_error` bounds."""


@dataclass(eq=False)
class Kind:
    """The units of one kind of a pair: arrays [layer, unit, patch], of the layers that are swept.

    Attributes:
        estimate, exact: float32 [outcome, ...]; exact is NaN where it was not computed.
        probability: float64, with which a unit is computed; 0 where it is not.
        cost: float64, FLOPs of a unit's row.
        errors: of every outcome.
    """

    unit: str
    estimate: np.ndarray
    cost: np.ndarray
    exact: np.ndarray = field(init=False)
    probability: np.ndarray = field(init=False)
    errors: list[screening.Errors | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exact = np.full_like(self.estimate, np.nan)
        self.probability = np.zeros(self.estimate.shape[1:])

    @property
    def known(self) -> np.ndarray:
        """bool: which are computed, or being so."""
        return self.probability > 0

    def size(self, top: int) -> np.ndarray:
        """|estimate| as a multiple of the `top`-th largest, of the outcome in which it is most; what is not finite is of all sizes."""
        sizes = np.abs(self.estimate.astype(np.float64))
        floors = [screening.threshold(one, top) for one in sizes]
        multiples = np.stack([one / (floor or 1.0) for one, floor in zip(sizes, floors, strict=True)])
        return np.nan_to_num(multiples.max(0), nan=np.inf, posinf=np.inf)

    def fit(self) -> None:
        """Learns how far estimates are off from what is known exactly."""
        pairs = zip(self.estimate, self.exact, strict=True)
        self.errors = [screening.Errors.fit(estimate[self.known], exact[self.known]) for estimate, exact in pairs]

    def chance(self, top: int) -> np.ndarray:
        """The chance that a unit is among the `top` largest of an outcome."""
        found = np.zeros(self.cost.shape)
        for estimate, exact, errors in zip(self.estimate, self.exact, self.errors, strict=True):
            if errors is not None:
                found = np.maximum(found, errors.exceeds(estimate, screening.threshold(exact, top)))
        return found if found.any() else self.size(top)

    @property
    def values(self) -> np.ndarray:
        """float32 [outcome, ...]: exact where known, else the estimate."""
        return np.where(self.known, self.exact, self.estimate)

    @property
    def error(self) -> np.ndarray:
        """float32 [outcome, ...]: what ERROR_PART of the errors of such estimates stay below; 0 where the value is exact, NaN where
        nothing is known of errors."""
        none = np.full(self.cost.shape, np.nan)
        of = [
            none if one is None else one.scale(np.abs(est)) * one.quantile(ERROR_PART)
            for est, one in zip(self.estimate, self.errors, strict=True)
        ]
        return np.where(self.known, 0.0, np.stack(of)).astype(np.float32)


@dataclass(frozen=True)
class Screen:
    """A pair while it is screened."""

    job: Job
    pair: int
    kinds: list[Kind]
    readout: Readout
    prepared: PreparedContrast
    rng: np.random.Generator
    base: list[np.ndarray] = field(default_factory=list)

    @staticmethod
    def of(job: Job, pair: int, prepared: PreparedContrast, readout: Readout, found: dict[str, np.ndarray]) -> Screen:
        """Args: found: kind -> first-order effects float32 [L, outcome, patch, unit] from the job's first layer on."""
        layers, shapes, kinds = np.asarray(job.layers), shapes_of(job.contrasts[pair]), []
        for unit, values in found.items():
            estimate = values[layers - layers[0]].transpose(1, 0, 3, 2)[..., : len(shapes)]  # [outcome, layer, unit, patch]
            flops = np.stack([row_flops(job.model.config, unit, shape)[layers] for shape in shapes], axis=-1)
            kinds.append(Kind(unit, estimate, np.broadcast_to(flops[:, None], estimate.shape[1:])))
        rng = np.random.default_rng([job.request.seed, zlib.crc32(job.pairs[pair].id.encode())])
        return Screen(job, pair, kinds, readout, prepared, rng)

    @property
    def _many(self) -> list[Kind]:
        return [kind for kind in self.kinds if kind.unit in self.job.screened(self.pair)]

    @cached_property
    def _budget(self) -> float:
        return self.job.chunk[BUDGET] / 1e6 * sum(float(kind.cost.sum()) for kind in self._many)

    def begin(self) -> None:
        """Computes all of the kinds that are few; of the others the largest estimates, and a sample."""
        top, chosen = self.job.request.top, {kind.unit: np.ones(kind.cost.shape, bool) for kind in self.kinds}
        many = self._many
        if many:
            sizes = [kind.size(top) for kind in many]
            certain = _most(many, sizes, screening.CERTAIN * self._budget, [np.zeros(kind.cost.shape, bool) for kind in many])
            for kind, size, first in zip(many, sizes, certain, strict=True):
                share = screening.SAMPLED * self._budget * kind.cost.sum() / sum(one.cost.sum() for one in many)
                weight = screening.weigh(np.where(np.isfinite(size), size, 0.0).ravel(), first.ravel())
                count = round(share / max(float((weight * kind.cost.ravel()).sum()), 1.0))
                kind.probability = screening.draw(weight, first.ravel(), count, self.rng).reshape(size.shape)
                chosen[kind.unit] = kind.known
        for kind in self.kinds:
            kind.probability = np.where(chosen[kind.unit], np.maximum(kind.probability, kind not in many), 0.0)
        self._run(chosen)()
        for kind in self.kinds:
            kind.fit()

    def go_on(self) -> Callable[[], None]:
        """Dispatches what the rest of the budget allows for: what is likeliest, for its cost, to be among the largest."""
        many, top = self._many, self.job.request.top
        if not many:
            return lambda: None
        known = [kind.known.copy() for kind in many]
        left = self._budget - sum(kind.cost[of].sum() for kind, of in zip(many, known, strict=True))
        worth = [kind.chance(top) / np.maximum(kind.cost, kind.cost.max() * 1e-3) for kind in many]
        more = _most(many, worth, left, known)
        for kind, of in zip(many, more, strict=True):
            kind.probability = np.where(of, 1.0, kind.probability)
        return self._run({kind.unit: of & ~had for kind, of, had in zip(many, more, known, strict=True)})

    def _run(self, chosen: dict[str, np.ndarray]) -> Callable[[], None]:
        """Dispatches exact rows of the units that are chosen; the call of what it returns puts their effects into place."""
        job, started = self.job, []
        shapes = shapes_of(job.contrasts[self.pair])
        for shape in dict.fromkeys(shapes):
            patches = [number for number, one in enumerate(shapes) if one == shape]
            window = open_window(self.prepared, *(self.prepared.contrast.patches[number] for number in patches))
            rows = self._rows(chosen, patches)
            if len(rows):
                size = job.chunk[shape.chunk_key(SCREENED)]
                started.append((rows, self._values(window, rows, patches, size)))
        return partial(self._collect, started)

    def _rows(self, chosen: dict[str, np.ndarray], patches: list[int]) -> np.ndarray:
        """int [rows, 4]: kind, layer, unit and patch as numbers in the arrays, in the order in which rows restart."""
        found = [
            np.column_stack([np.full(chosen[kind.unit][..., patches].sum(), number), *np.nonzero(chosen[kind.unit][..., patches])])
            for number, kind in enumerate(self.kinds)
            if kind.unit in chosen
        ]
        rows = np.concatenate(found)
        rows[:, 3] = np.asarray(patches)[rows[:, 3]]
        late = np.asarray([MEDIATORS[kind.unit].by_layer for kind in self.kinds])[rows[:, 0]]
        return rows[np.lexsort((rows[:, 3], rows[:, 2], rows[:, 0], rows[:, 1] + late))]

    def _values(self, window: Window, rows: np.ndarray, patches: list[int], size: int) -> Values:
        model, layers = self.job.model, self.job.layers
        units = [(self.kinds[kind].unit, layers[layer], int(index)) for kind, layer, index, _ in rows]
        which = np.searchsorted(patches, rows[:, 3])
        return unit_values(model, window, units, self.job.request.window, size, self.readout, patches=which)

    def _collect(self, started: list[tuple[np.ndarray, Values]]) -> None:
        for rows, values in started:
            effects, base = values.effects(len(rows))
            self.base.append(base)
            for number, kind in enumerate(self.kinds):
                here = rows[:, 0] == number
                kind.exact[:, rows[here, 1], rows[here, 2], rows[here, 3]] = effects[:, here]

    def chunks(self) -> list[Chunk]:
        """What the pair leaves in the table."""
        job, found = self.job, []
        for kind in self.kinds:
            name, alone = variable(kind.unit, "indirect"), not MEDIATORS[kind.unit].axis
            parts = {name: kind.values, f"{name}_{ESTIMATE}": kind.estimate, f"{name}_{ERROR}": kind.error}
            for number, layer in enumerate(job.layers):
                place = {"pair": self.pair, "layer": layer}
                of_layer = {end: values[:, number, 0] if alone else values[:, number] for end, values in parts.items()}
                found += [(end, place, in_table(job, values)) for end, values in of_layer.items()]
                chance = by_position(job, kind.probability[number, 0] if alone else kind.probability[number], 0.0)
                found += [(f"{name}_{PROBABILITY}", place, chance.astype(np.float32))]
                found += [(f"{name}_{VERIFIED}", place, (chance > 0).astype(np.uint8))]
            found += self._recalled(kind, name)
        base = np.concatenate(self.base, axis=1) if self.base else self.prepared.base_outcome[:, None]
        spread = {"base_lowest": one_outcome(job, base.min(1)), "base_highest": one_outcome(job, base.max(1))}
        return found + [(end, {"pair": self.pair, "layer": layer}, values) for layer in job.layers for end, values in spread.items()]

    def _recalled(self, kind: Kind, name: str) -> list[Chunk]:
        """The recall of every outcome."""
        kind.fit()
        flat = [(kind.estimate[number].ravel(), kind.exact[number].ravel(), errors) for number, errors in enumerate(kind.errors)]
        recalls = [screening.recall(estimate, exact, self.job.request.top, errors, self.rng) for estimate, exact, errors in flat]
        told = np.asarray([(one.mean, one.low, one.high) for one in recalls], np.float32).T
        return [(f"{name}_{end}", {"pair": self.pair}, one_outcome(self.job, values)) for end, values in zip(RECALL, told, strict=True)]


def _most(kinds: list[Kind], worth: list[np.ndarray], budget: float, known: list[np.ndarray]) -> list[np.ndarray]:
    """The units that are worth most, as many as a budget of FLOPs allows for. Those that are known cost nothing, and are taken as the
    others are: whether one is taken must not depend on whether it was drawn before."""
    flat, cost, free = (np.concatenate([np.ravel(one) for one in parts]) for parts in (worth, [kind.cost for kind in kinds], known))
    order = np.argsort(-flat, kind="stable")
    order = order[flat[order] > 0]
    taken = np.zeros(len(flat), bool)
    taken[order[np.cumsum(np.where(free, 0.0, cost)[order]) <= budget]] = True
    ends = np.cumsum([kind.cost.size for kind in kinds])[:-1]
    return [part.reshape(kind.cost.shape) for part, kind in zip(np.split(taken, ends), kinds, strict=True)]
