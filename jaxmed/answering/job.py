"""A request for answers before it runs: checked against model, pairs and sets, with its random sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jaxmed.answering.spec import AnswersSpec
from jaxmed.effects.contrast import Contrast, Reading, Side, make_contrasts
from jaxmed.effects.mediators import MEDIATORS, Unit
from jaxmed.effects.sets import Membership, UnitSet, check_sets, kinds_of, membership
from jaxmed.errors import UserError, quoted
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.cost import propagate_flops
from jaxmed.tokens import DATE, check_tokens

RANDOM = "random like "


@dataclass(frozen=True)
class Condition:
    """What is answered: the prompts of a side, with a set patched, or none.

    Attributes:
        name: of the set; empty for none.
        prompts: "base" or "source".
    """

    name: str
    prompts: str


@dataclass(frozen=True)
class AnswersJob:
    """A checked request.

    Attributes:
        sets: those that were asked for, and their random ones.
        contrasts: one per pair; control pairs have been left out.
        random: name of a set that was asked for -> names of its random sets.
    """

    model: Model
    pairs: tuple[PromptPair, ...]
    spec: AnswersSpec
    sets: tuple[UnitSet, ...]
    contrasts: tuple[Contrast, ...]
    contrast: str
    form: str
    random: Mapping[str, tuple[str, ...]]
    source_model: Model | None = None

    @property
    def conditions(self) -> list[Condition]:
        """Answers as they are, to both sides, and base's under every set."""
        return [Condition("", "base"), Condition("", "source"), *(Condition(one.name, "base") for one in self.sets)]

    @property
    def follows(self) -> bool:
        """Whether units keep what another model has on the text so far."""
        return self.source_model is not None and self.spec.patch == "resample"

    def size(self) -> tuple[int, float]:
        """Tokens that are written at most, and matmul FLOPs of prompts and tokens; of both models where one follows the other."""
        config, tokens, flops = self.model.config, 0, 0.0
        for condition in self.conditions:
            for contrast in self.contrasts:
                length = len(getattr(contrast, condition.prompts).ids)
                seen = length + self.spec.tokens // 2
                each = propagate_flops(config, 1, 1, seen, config.layers) + 2.0 * config.width * config.vocabulary
                models = 2 if self.follows and condition.name else 1
                flops += models * (propagate_flops(config, 1, length, 0, config.layers) + self.spec.samples * self.spec.tokens * each)
                tokens += self.spec.samples * self.spec.tokens
        return tokens, flops

    def members(self, names: Sequence[str]) -> Membership:
        """The units of sets by name, one row each."""
        units = {one.name: one.units for one in self.sets}
        rows = [units[name] for name in names]
        return membership(self.model.config, rows, 1, kinds_of(unit for row in rows for unit in row))

    def with_weights(self, model: Model, source_model: Model | None = None) -> AnswersJob:
        """The job on models that have weights."""

        def loaded(side: Side) -> Side:
            return replace(side, model=model if side.model is self.model else source_model or model)

        contrasts = tuple(replace(one, base=loaded(one.base), source=loaded(one.source)) for one in self.contrasts)
        return replace(self, model=model, source_model=source_model, contrasts=contrasts)

    def manifest(self) -> dict[str, Any]:
        """What makes two requests the same."""
        return {
            "answering": asdict(self.spec),
            "contrast": self.contrast,
            "form": self.form,
            "sets": [asdict(one) for one in self.sets],
            "model": self.model.record,
            **({"source_model": self.source_model.record} if self.source_model is not None else {}),
            **({"history": list(self.model.history)} if self.model.history else {}),
            "mesh": dict(self.model.mesh.shape),
            "pairs": [pair.id for pair in self.pairs],
            "labels": [[pair.category, pair.group] for pair in self.pairs],
            "tokens": [{"base": one.base.ids.tolist(), "source": one.source.ids.tolist()} for one in self.contrasts],
            "template_date": DATE.date().isoformat(),
        }


def make_answers(
    model: Model,
    pairs: Sequence[PromptPair],
    sets: Sequence[UnitSet],
    spec: AnswersSpec,
    contrast: str | None = None,
    form: str = "chat",
    source_model: Model | None = None,
) -> AnswersJob:
    """Everything that can be refused before anything is written; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: no pairs but controls; no sets, or units that the model does not have; held units; numbers out of range.
    """
    spec.check()
    contrast = contrast or ("pair" if source_model is None else "model")
    if (contrast == "model") != (source_model is not None):
        raise UserError("--contrast model and --source-model go together.")
    counted = tuple(pair for pair in pairs if not pair.control)
    if not counted:
        raise UserError("There are no pairs to answer (control pairs do not count).")
    if not sets:
        raise UserError('Give --sets: a JSON list of units that are patched together, [{"name": "a", "units": [["neuron", 29, 17]]}].')
    if held := [one.name for one in sets if one.held]:
        raise UserError(f"Set {held[0]!r} holds units at base values, which written text does not have. Leave `held` out.")
    _check_names(counted, sets)
    asked = check_sets(model.config, sets, 1)
    drawn = {one.name: _random_sets(model.config, one, number, spec) for number, one in enumerate(asked)}
    whole = check_sets(model.config, (*asked, *(one for several in drawn.values() for one in several)), 1)
    contrasts = make_contrasts(model, counted, Reading(contrast, "last", form, ()), source_model)
    for used in {id(side.model): side.model for one in contrasts for side in (one.base, one.source)}.values():
        check_tokens(used.config, [one.base.ids for one in contrasts], "A prompt with its answer", used.tokenizer, spec.tokens)
    names = {name: tuple(one.name for one in several) for name, several in drawn.items()}
    return AnswersJob(model, counted, spec, whole, contrasts, contrast, form, names, source_model)


def _check_names(pairs: Sequence[PromptPair], sets: Sequence[UnitSet]) -> None:
    """Raises a UserError for pairs of one id, for sets named as random ones are, and for windows, whose width a set does not say."""
    ids = Counter(pair.id for pair in pairs)
    if repeated := [name for name, count in ids.items() if count > 1]:
        raise UserError(f"The pair {quoted(repeated[0])} is given {ids[repeated[0]]} times. Give every pair an id of its own.")
    for one in sets:
        if one.name.startswith(RANDOM) or not one.name:
            raise UserError(f"A set cannot be named {quoted(one.name)}: names that begin with {RANDOM!r} are of random sets.")
        if any(kind == "window" for kind, _, _ in one.units):
            raise UserError(f"Set {quoted(one.name)} names a window. Name its neurons one by one here.")


def _random_sets(config: ModelConfig, one: UnitSet, number: int, spec: AnswersSpec) -> list[UnitSet]:
    """Sets of as many other units of the same kinds and layers (whole modules: of other layers); none where there are too few."""
    counts, made = Counter((kind, layer) for kind, layer, _ in dict.fromkeys(one.units)), []
    whole = {kind for kind, _ in counts if MEDIATORS[kind].count(config, 1) == 1}
    for draw in range(spec.random):
        rng = np.random.default_rng([spec.seed, number, draw])
        units: list[Unit] = []
        for kind in sorted(whole):
            taken = {layer for of, layer in counts if of == kind}
            free = [layer for layer in range(config.layers) if layer not in taken]
            units += [(kind, int(layer), 0) for layer in rng.permutation(free)[: len(taken)]]
        for (kind, layer), count in counts.items():
            if kind not in whole:
                taken = {index for of, at, index in one.units if (of, at) == (kind, layer)}
                free = [index for index in range(MEDIATORS[kind].count(config, 1)) if index not in taken]
                units += [(kind, layer, int(index)) for index in rng.permutation(free)[:count]]
        if len(units) == sum(counts.values()):
            made.append(UnitSet(f"{RANDOM}{one.name}" + (f" {draw + 1}" if spec.random > 1 else ""), tuple(units)))
    return made
