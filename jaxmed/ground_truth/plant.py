"""`jm.planted`: models whose mechanism is known, to test a method on."""

from __future__ import annotations

from collections.abc import Callable

from jaxmed.errors import UserError, unknown
from jaxmed.ground_truth.emergent import train_emergent
from jaxmed.ground_truth.features import Head, write_model
from jaxmed.ground_truth.mechanisms import MECHANISMS, Mechanism
from jaxmed.ground_truth.pairs import make_pairs
from jaxmed.ground_truth.record import Planted, PlantedSet, PlantedUnit
from jaxmed.ground_truth.trained import train_trigger

NOISE = 0.04
MOST_NOISE = 0.06
TRAINED: dict[str, Callable[[int], Planted]] = {"trigger": train_trigger, "emergent": train_emergent}


def planted(name: str, noise: float | None = None, seed: int = 0) -> Planted:
    """A tiny model with a known mechanism, prompts that show it, and the truth about its units.

    The weights of hand-made mechanisms are written, not trained: four layers of a Llama whose planted units do exactly what their row
    says, among random ones. Expected effects are closed forms; without noise exact effects agree with them to 2e-3, with the default
    noise to a tenth of the total.

    Args:
        name: "gate", "adder", "pair", "cancel", "copy" or "path"; or "trigger" or "emergent", which are trained on the spot, in about a
            minute on one core.
        noise: standard deviation of all weights without a meaning, 0 to 0.06; 0.04 by default. Not for trained models.
        seed: of the units' places, the noise and the words.

    Raises:
        UserError: an unknown name, or noise that is out of range.
    """
    if name in TRAINED:
        if noise is not None:
            raise UserError(f"{name!r} is trained, so it takes no noise. Leave it out.")
        return TRAINED[name](seed)
    if name not in MECHANISMS:
        raise unknown("planted model", name, [*MECHANISMS, *TRAINED])
    if noise is not None and not 0 <= noise <= MOST_NOISE:
        raise UserError(f"noise is {noise}; legal: 0 to {MOST_NOISE}. Above that, noise drowns what is planted.")
    return _plant(name, MECHANISMS[name], NOISE if noise is None else noise, seed)


def _plant(name: str, row: Mechanism, noise: float, seed: int) -> Planted:
    parts = list(row.parts.values())
    model, places = write_model(f"planted {name}", parts, row.logits, noise, seed)
    units = {
        label: PlantedUnit(
            label, "head_out" if isinstance(part, Head) else "neuron", part.layer, index, part.position, part.kind, part.effect
        )
        for (label, part), index in zip(row.parts.items(), places, strict=True)
    }
    modules = [
        PlantedUnit(f"{mediator} {layer}", mediator, layer, 0, position, "module", effect)
        for mediator, layer, position, effect in row.modules
    ]
    sets = tuple(PlantedSet(tuple(units[label] for label in labels), effect) for labels, effect in row.joint.items())
    pairs, first = tuple(make_pairs(row.slots, seed)), min(row.slots.signals)
    return Planted(name, row.told, model, pairs, (*units.values(), *modules), sets, row.total, first, row.gating_index)
