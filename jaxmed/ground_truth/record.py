"""What a planted model comes with: the truth, and how well something that was found agrees with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxmed.errors import UserError, unknown
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair


@dataclass(frozen=True)
class PlantedUnit:
    """A unit that carries the behaviour.

    Attributes:
        name: what the truth calls it.
        mediator: "neuron", "head_out", or a module: "attention_out", "mlp_out", "residual_out".
        layer, index: where it is; the index is 0 for a module.
        position: of the token at which it acts, counted from the right: -1 is the last token of the prompt.
        kind: "reads", "signals", "gate", "adder", "cooperates", "joins", "cancels", "copies" or "path"; "module" where units of the
            other kinds act inside it.
        effect: the expected indirect effect of this unit alone on logit-diff: mean over the pairs that are no controls.
    """

    name: str
    mediator: str
    layer: int
    index: int
    position: int
    kind: str
    effect: float


@dataclass(frozen=True)
class PlantedSet:
    """Units that are patched together, each at its own position, and the expected indirect effect on logit-diff."""

    units: tuple[PlantedUnit, ...]
    effect: float


@dataclass(frozen=True)
class Score:
    """How well what was found agrees with what was planted.

    Attributes:
        precision: share of the found units that are planted; 1 where nothing was found.
        recall: share of the planted units that were found; 1 where none is visible.
        missed, extra: (layer, index, position), sorted.
    """

    precision: float
    recall: float
    missed: tuple[tuple[int, int, int], ...]
    extra: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Planted:
    """A model whose mechanism is known.

    Attributes:
        name: a key of `MECHANISMS`.
        told: what the mechanism does.
        model: an ordinary model; its prompts have the form "text".
        pairs: prompt pairs, base and source equally long, with controls in which nothing happens.
        units: the truth, unit by unit; empty for a model that was trained.
        sets: the truth about units that are patched together.
        total: mean y(source) - y(base) on logit-diff over the pairs that are no controls.
        first_position: the first token, counted from the right, at which base and source differ: no unit of an earlier token has an effect.
        gating_index: 1 - effect(units that signal, with the planted neurons of the last layer held at base) / effect(units that signal):
            1 for a gate, 0 where the last layer merely adds; None where there is nothing to hold.
    """

    name: str
    told: str
    model: Model
    pairs: tuple[PromptPair, ...]
    units: tuple[PlantedUnit, ...]
    sets: tuple[PlantedSet, ...]
    total: float
    first_position: int
    gating_index: float | None = None

    def visible(self, mediator: str) -> tuple[PlantedUnit, ...]:
        """The planted units of a mediator that have an effect alone."""
        return tuple(unit for unit in self.units if unit.mediator == mediator and unit.effect)

    def score(self, mediator: str, found: Iterable[tuple[int, ...]]) -> Score:
        """Precision and recall of found units against those that have an effect alone.

        Args:
            found: (layer, index), or (layer, index, position) with the position counted from the right, else -1.

        Raises:
            UserError: a mediator without truth, or what is no such tuple.
        """
        legal = dict.fromkeys(unit.mediator for unit in self.units)
        if mediator not in legal:
            raise unknown("mediator", mediator, legal) if legal else UserError(f"{self.name!r} was trained: its units are not known.")
        given = [tuple(int(number) for number in one) for one in found]
        if wrong := [one for one in given if len(one) not in (2, 3)]:
            raise UserError(f"A found unit is (layer, index) or (layer, index, position), not {wrong[0]}.")
        seen = {(one[0], one[1], one[2] if len(one) == 3 else -1) for one in given}
        true = {(unit.layer, unit.index, unit.position) for unit in self.visible(mediator)}
        hits = len(seen & true)
        precision, recall = (hits / len(units) if units else 1.0 for units in (seen, true))
        return Score(precision, recall, tuple(sorted(true - seen)), tuple(sorted(seen - true)))
