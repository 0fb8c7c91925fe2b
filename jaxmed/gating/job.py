"""A study of a gate before it runs: what is asked, checked against model and pairs, and the sweeps that it consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from jaxmed.effects.job import Job, make_job, manifest
from jaxmed.effects.mediators import Unit
from jaxmed.effects.outcomes import OutcomeName, outcome_name
from jaxmed.effects.request import Request
from jaxmed.effects.sets import UnitSet
from jaxmed.errors import UserError, check_seed
from jaxmed.gating.cases import UPSTREAM, Case, Layout, ladder, make_cases
from jaxmed.gating.spec import GateSpec
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.prompts.examples import digest
from jaxmed.prompts.pair import PromptPair
from jaxmed.prompts.readers import read_text
from jaxmed.tokens import BY_POSITION, check_length

MODULES = ("attention_out", "mlp_out")
FEWEST_GROUPS = 4
"""Two to rank in, and two to test in."""
AUTO = {kind: f"strongest earlier {kind}" for kind in MODULES}
"""Upstream modules that discovery pairs choose."""


MOST_DRAWS, MOST_SHUFFLES = 1000, 100_000
"""Controls that a study may have: each draw is a set that is patched jointly."""


@dataclass(frozen=True)
class GateRequest:
    """What is asked of which outcome.

    Attributes:
        outcome, position, form, contrast: as a sweep takes them; one outcome, and one place.
    """

    spec: GateSpec = field(default_factory=GateSpec)
    outcome: OutcomeName = "log-odds"
    position: str | int = "last"
    form: str = "chat"
    contrast: str = "pair"

    def sweep(self, **more: Any) -> Request:
        """A sweep of the same outcome and place."""
        how = {name: getattr(self, name) for name in ("position", "form", "contrast")}
        return Request(outcomes=(self.outcome,), seed=self.spec.seed, **how, **more)


@dataclass(frozen=True)
class GateJob:
    """A checked request on a model and pairs.

    Attributes:
        layout: sizes, with layers counted from 0.
        halves: int [P], the half in which a pair is tested; control pairs are tested with the first half and rank nothing.
        singles: the sweeps of single units: "modules" of all layers, and "neurons" of the layer and of the control layer.
    """

    model: Model
    pairs: tuple[PromptPair, ...]
    request: GateRequest
    layout: Layout
    halves: np.ndarray
    singles: dict[str, Job]
    source_model: Model | None = None

    @property
    def cases(self) -> list[Case]:
        return make_cases(self.layout)

    @property
    def counted(self) -> np.ndarray:
        """bool [P], whether a pair is no control."""
        return np.asarray([not pair.control for pair in self.pairs])

    def discovery(self, half: int) -> np.ndarray:
        """Numbers of the pairs that rank for a half."""
        return np.flatnonzero(self.counted & (self.halves != half))

    def tested(self, half: int) -> list[PromptPair]:
        """The pairs of a half."""
        return [self.pairs[number] for number in np.flatnonzero(self.halves == half)]

    def joint(self, half: int, sets: Sequence[UnitSet]) -> Job:
        """The sweep of a half, with the sets that the other one has chosen; one layer stands for all, since sets have none of their own."""
        request = self.request.sweep(units=(), sets=tuple(sets), layers=(self.layout.layer,))
        return make_job(self.model, self.tested(half), request, self.source_model)

    def upstream_unit(self, name: str, chosen: dict[str, Unit]) -> Unit:
        """The module that a name stands for."""
        return chosen[name] if name in chosen else _module(name)

    def with_weights(self, model: Model, source_model: Model | None = None) -> GateJob:
        """The job on models that have weights."""
        singles = {name: job.with_weights(model, source_model) for name, job in self.singles.items()}
        return replace(self, model=model, source_model=source_model, singles=singles)

    def stand_in(self, half: int) -> Job:
        """A sweep of a half whose sets begin where the real ones will, before anything is known: for plans."""
        middle = {name: (kind, self.layout.layer // 2, 0) for kind, name in AUTO.items()}

        def first(case: Case) -> Unit:
            if case.role in UPSTREAM:
                return self.upstream_unit(case.by, middle)
            return "neuron", self.layout.control if case.role == "other layer" else self.layout.layer, 0

        return self.joint(half, [UnitSet(case.name, (first(case),)) for case in self.cases])


def make_gate(model: Model, pairs: Sequence[PromptPair], request: GateRequest, source_model: Model | None = None) -> GateJob:
    """Everything that can be refused before a study runs; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: what a sweep refuses; too few groups; a place that is several; layers, modules, widths and counts out of range.
    """
    check_seed(request.spec.seed)
    if request.position in BY_POSITION:
        raise UserError(f"A gate is looked for at one place; --position {request.position} names one after another. Give last, user, ...")
    spec, config = request.spec, model.config
    _check_counts(spec, config)
    middle = config.layers // 2 if spec.control_layer is None else spec.control_layer
    layer, control = _layer("--layer", spec.layer, config), _layer("--control-layer", middle, config)
    if layer == 0:
        raise UserError("--layer 0 has no layer before it whose signal it could gate. Give a later one.")
    upstream = spec.upstream or tuple(AUTO.values())
    for name in spec.upstream:
        kind, at, _ = _module(name)
        if not 0 <= at < layer and not (at == layer and kind == "attention_out"):
            raise UserError(f"--upstream {name} does not come before the neurons of layer {layer}.")
    names = list(dict.fromkeys(pair.group for pair in pairs if not pair.control))
    if len(names) < FEWEST_GROUPS:
        raise UserError(
            f"A gate is ranked in one half of the groups and tested in the other: {len(names)} are too few, give {FEWEST_GROUPS}."
        )
    of_group = dict(zip(np.random.default_rng([spec.seed, 0]).permutation(names).tolist(), range(len(names)), strict=True))
    halves = np.asarray([0 if pair.control else of_group[pair.group] % 2 for pair in pairs])
    layout = Layout(layer, control, config.neurons, ladder(config.neurons), upstream, spec.windows, spec.draws, spec.shuffles)
    singles = {
        "modules": make_job(model, pairs, request.sweep(units=MODULES), source_model),
        "neurons": make_job(model, pairs, request.sweep(units=("neuron",), layers=tuple(sorted({layer, control}))), source_model),
    }
    sides = [side for contrast in singles["neurons"].contrasts for side in (contrast.base, contrast.source)]
    for side in sides if spec.tokens else ():
        check_length(side.model.config, len(side.ids) + spec.tokens, "A prompt with its answer")
    return GateJob(model, tuple(pairs), request, layout, halves, singles, source_model)


def _check_counts(spec: GateSpec, config: ModelConfig) -> None:
    for flag, number, most in (("--draws", spec.draws, MOST_DRAWS), ("--shuffles", spec.shuffles, MOST_SHUFFLES)):
        if not 1 <= number <= most:
            raise UserError(f"{flag} {number} is out of range: whole numbers from 1 to {most:,}.")
    if not 0 < spec.sufficient < 1:
        raise UserError(f"--sufficient {spec.sufficient} is no part of an effect; legal: between 0 and 1.")
    wrong = [width for width in spec.windows if not 2 <= width <= config.neurons // 2]
    if wrong or len(set(spec.windows)) < len(spec.windows):
        raise UserError(f"--windows {' '.join(map(str, spec.windows))}: each once, and from 2 to {config.neurons // 2} neurons.")


def _layer(flag: str, number: int, config: ModelConfig) -> int:
    if not -config.layers <= number < config.layers:
        raise UserError(f"{flag} {number}: this model has layers 0 to {config.layers - 1}; negative ones count from the last.")
    return number % config.layers


def _module(name: str) -> Unit:
    """The unit of a text such as mlp_out:11."""
    kind, _, layer = name.partition(":")
    if kind not in MODULES or not layer.isdecimal():
        raise UserError(f"--upstream {name!r} is no module; write attention_out:LAYER or mlp_out:LAYER.")
    return kind, int(layer), 0


def gate_manifest(job: GateJob) -> dict[str, Any]:
    """What makes two studies the same study."""
    request = {**asdict(job.request), "outcome": outcome_name(job.request.outcome)}
    sweeps = {name: manifest(one) for name, one in job.singles.items()}
    shared = {key: value for key, value in sweeps["modules"].items() if key not in ("request", "chunk", "layers")}
    text = job.request.spec.text if job.request.spec.tokens else ""
    return {"gate": request, "layout": asdict(job.layout), "contents": digest([], read_text(text) if text else ""), **shared}
