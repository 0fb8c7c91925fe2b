"""What a study of a gate patches jointly, as named sets: cases that the request alone decides, and their units by the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmed.effects.mediators import Unit
from jaxmed.effects.sets import UnitSet
from jaxmed.gating.rankings import RANKINGS, Evidence, matched, order

UPSTREAM = ("upstream", "held", "held matched")
"""Roles in which a module before the layer is patched."""


@dataclass(frozen=True)
class Case:
    """A joint patch.

    Attributes:
        role: "top", the first k neurons of a ranking; "rest", all others; "matched", k random ones of the same size; "other layer", the
            first k of the control layer; "upstream", a module before the layer; "held" and "held matched", that module with neurons of
            the layer held at base; "window" and "shuffled", adjacent and random neurons.
        by: the ranking, the upstream module, or the width of a window.
        k: how many neurons; for windows, which one.
        draw: number of a random draw.
    """

    role: str
    by: str = ""
    k: int = 0
    draw: int = 0

    @property
    def name(self) -> str:
        """Of its set."""
        return " ".join(str(part) for part in (self.role, self.by, self.k, self.draw) if part != "")


@dataclass(frozen=True)
class Layout:
    """The sizes of a study of a gate.

    Attributes:
        layer, control: the layer whose neurons are ranked, and the one that is compared.
        neurons: of a layer.
        ladder: ks, rising.
        upstream: names of the modules whose effect may go through the neurons.
        windows: widths of windows.
        draws, shuffles: random controls of every k, and orders that windows are compared with.
    """

    layer: int
    control: int
    neurons: int
    ladder: tuple[int, ...]
    upstream: tuple[str, ...]
    windows: tuple[int, ...]
    draws: int
    shuffles: int

    @property
    def matchable(self) -> tuple[int, ...]:
        """The ks for which there are as many other neurons to draw among."""
        return tuple(k for k in self.ladder if 4 * k <= self.neurons)


def ladder(neurons: int) -> tuple[int, ...]:
    """Powers of two, and in the end all neurons."""
    return (*(1 << n for n in range(neurons.bit_length()) if 1 << n < neurons), neurons)


def make_cases(layout: Layout) -> list[Case]:
    """All cases, in a fixed order."""
    draws = range(layout.draws)
    found = [Case("top", ranking, k) for ranking in RANKINGS for k in layout.ladder]
    found += [Case("rest", "effect", k) for k in layout.ladder if k < layout.neurons]
    found += [Case("matched", "effect", k, draw) for k in layout.matchable for draw in draws]
    found += [Case("other layer", "effect", k) for k in layout.ladder] if layout.control != layout.layer else []
    for module in layout.upstream:
        found += [Case("upstream", module), *(Case("held", module, k) for k in layout.ladder)]
        found += [Case("held matched", module, k, draw) for k in layout.matchable for draw in draws]
    for width in layout.windows:
        count = -(-layout.neurons // width)
        found += [Case("window", str(width), index) for index in range(count)]
        found += [Case("shuffled", str(width), index, draw) for draw in range(layout.shuffles) for index in range(count)]
    return found


@dataclass(frozen=True)
class Chosen:
    """What discovery pairs chose.

    Attributes:
        evidence, elsewhere: of the layer, and of the control layer (effects alone are read).
        upstream: name of a module -> the unit.
        seed: of random draws.
    """

    evidence: Evidence
    elsewhere: np.ndarray
    upstream: Mapping[str, Unit]
    seed: int


def make_sets(cases: Sequence[Case], layout: Layout, chosen: Chosen) -> list[UnitSet]:
    """The units of every case."""
    orders = {ranking: order(ranking, chosen.evidence) for ranking in RANKINGS}
    size = chosen.evidence.features.size
    orders["other layer"] = np.argsort(-chosen.elsewhere, kind="stable")
    like = {
        (k, draw): matched(orders["effect"][:k], size, (chosen.seed, 2, k, draw)) for k in layout.matchable for draw in range(layout.draws)
    }
    shuffled = [np.random.default_rng([chosen.seed, 3, draw]).permutation(layout.neurons) for draw in range(layout.shuffles)]

    def neurons(case: Case) -> np.ndarray:
        match case.role:
            case "top" | "held":
                return orders[case.by if case.role == "top" else "effect"][: case.k]
            case "rest":
                return orders["effect"][case.k :]
            case "matched" | "held matched":
                return like[case.k, case.draw]
            case "other layer":
                return orders["other layer"][: case.k]
            case "window" | "shuffled":
                order_of = np.arange(layout.neurons) if case.role == "window" else shuffled[case.draw]
                return order_of[case.k * int(case.by) : (case.k + 1) * int(case.by)]
        return np.zeros(0, int)

    def one(case: Case) -> UnitSet:
        layer = layout.control if case.role == "other layer" else layout.layer
        units = tuple(("neuron", layer, int(index)) for index in np.sort(neurons(case)))
        if case.role in UPSTREAM:
            return UnitSet(case.name, (chosen.upstream[case.by],), units)
        return UnitSet(case.name, units)

    return [one(case) for case in cases]
