"""`jm.patch`: the effect of units that are patched together, on one pair, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmed.axes import vocabulary_parts
from jaxmed.effects.contrast import Reading, make_contrast, make_contrasts
from jaxmed.effects.engine import open_window, prepare
from jaxmed.effects.joint import set_values
from jaxmed.effects.outcomes import OutcomeName, check_outcomes
from jaxmed.effects.patches import PATCHES, Patching, check_patch, with_patch
from jaxmed.effects.readout import Readout
from jaxmed.effects.reference import make_reference
from jaxmed.effects.sets import UnitSet, as_unit, check_sets, kinds_of
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair


class Patched(NamedTuple):
    """Outcomes of the base run, of the patched one and of the source run.

    Attributes:
        base, patched, source: in the units of the outcome.
    """

    base: float
    patched: float
    source: float

    @property
    def effect(self) -> float:
        """y(base; units := what is written there) - y(base)."""
        return self.patched - self.base

    @property
    def total(self) -> float:
        """y(source) - y(base)."""
        return self.source - self.base


def patch(
    model: Model,
    pair: PromptPair,
    units: Sequence[Sequence[Any]],
    outcome: OutcomeName = "log-odds",
    position: str | int = "last",
    window: int = 32,
    form: str = "chat",
    held: Sequence[Sequence[Any]] = (),
    patch: str = "resample",
    patch_factor: float | None = None,
    seed: int = 0,
    reference: Sequence[PromptPair] = (),
) -> Patched:
    """Runs a pair with units of its base run set to their values in the source run, or to what another patch writes, all together.

    Args:
        units: (mediator, layer, index), such as ("neuron", 29, 17) or ("mlp_out", 11).
        held: units that keep their base values meanwhile.
        outcome, position, window, form, patch, patch_factor, seed: as `jm.sweep` takes them; "each" is one position too many here.
        reference: the pairs that the patch's means are taken over; by default, this one alone.

    Raises:
        UserError: anything in the arguments that cannot be used.
    """
    (one,) = check_sets(model.config, [UnitSet("units", *(tuple(map(as_unit, those)) for those in (units, held)))], window)
    outcomes = check_outcomes((outcome,), model.config.vocabulary)
    asked, reading = check_patch(Patching(patch, patch_factor, seed)), Reading("pair", position, form, outcomes)
    contrast = make_contrast(model, pair, reading)
    if len(contrast.patches) != 1:
        raise UserError(f"jm.patch patches one place; position {position!r} names {len(contrast.patches)}. Use jm.sweep with sets=.")
    kinds = kinds_of((*one.units, *one.held))
    known = make_reference(PATCHES[patch].needs, make_contrasts(model, reference, reading) if reference else (contrast,), kinds)
    prepared = with_patch(prepare(contrast, outcomes, kinds, stream=True), asked, known)
    readout = Readout(outcomes, vocabulary_parts(model.mesh))
    values = set_values(model, open_window(prepared, contrast.patches[0]), [one], window, 1, readout)
    effect, base = values.effects(1)
    return Patched(float(base[0, 0]), float(base[0, 0] + effect[0, 0]), float(prepared.source_outcome[0]))
