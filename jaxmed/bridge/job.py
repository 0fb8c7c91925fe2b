"""The bridge before it runs: which weights are pruned, what is swept and tested, and everything that can be refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.bridge.enrichment import ALIKE, BEHAVIOUR, RANDOM
from jaxmed.bridge.spec import BridgeSpec
from jaxmed.effects.job import Job, make_job
from jaxmed.effects.sets import UnitSet
from jaxmed.errors import UserError
from jaxmed.experiments.measure import Tests, make_tests
from jaxmed.gating.job import MOST_DRAWS, GateJob, gate_manifest
from jaxmed.models.model import Model
from jaxmed.prompts.examples import HELDOUT, Example, chosen, digest, harmful
from jaxmed.prompts.readers import read_text
from jaxmed.pruning import job as scoring
from jaxmed.pruning.apply import check_mask
from jaxmed.pruning.masks import Mask, read_mask
from jaxmed.pruning.rule import Rule

MASK_FILE = ".safetensors"
MODULES = ("head_out", "attention_out", "mlp_out")
TAKEN = (BEHAVIOUR, RANDOM, ALIKE)
"""Names of masks that are ours."""


@dataclass(frozen=True)
class BridgeJob:
    """A checked bridge.

    Attributes:
        scored: set -> its scoring run; the preserve set is scored with the first one.
        masks: name -> a mask that was given as a file.
        tests: what says what a mask does and costs.
        heads: sweep of single heads.
        contents: digest of all examples and of the text.
    """

    gate: GateJob
    spec: BridgeSpec
    scored: Mapping[str, scoring.Job]
    masks: Mapping[str, Mask]
    tests: Tests
    heads: Job
    contents: str

    @property
    def names(self) -> tuple[str, ...]:
        """The behaviour, then the control behaviours."""
        return tuple(short(one) for one in (self.spec.prune, *self.spec.prune_controls))

    @property
    def rule(self) -> Rule:
        return Rule(q=self.spec.q, p=self.spec.p)

    @property
    def measured(self) -> np.ndarray:
        """Numbers of the pairs that are measured under every mask."""
        return np.flatnonzero(self.gate.counted)[: self.spec.prune_pairs]

    def with_weights(self, gate: GateJob) -> BridgeJob:
        """The job on a gate's models that have weights; a UserError where a mask is of others."""
        for mask in self.masks.values():
            check_mask(gate.model, mask)
        scored = {name: replace(one, model=gate.model) for name, one in self.scored.items()}
        return replace(self, gate=gate, scored=scored, heads=self.heads.with_weights(gate.model, gate.source_model))

    def sweep(self, model: Model, **what: Any) -> Job:
        """A sweep of the gate's pairs on a model that may be pruned."""
        return make_job(model, self.gate.pairs, self.gate.request.sweep(**what), self.gate.source_model)

    def after(self, model: Model, sets: tuple[UnitSet, ...]) -> dict[str, Job]:
        """The sweeps of the pruned model: the layer's neurons; all heads and modules, and sets."""
        layer = (self.gate.layout.layer,)
        return {"after-neurons": self.sweep(model, units=("neuron",), layers=layer), "after": self.sweep(model, units=MODULES, sets=sets)}

    def manifest(self) -> dict[str, Any]:
        """What makes two bridges the same."""
        masks = {name: mask.digest for name, mask in self.masks.items()}
        return {"bridge": asdict(self.spec), "masks": masks, "examples": self.contents, **gate_manifest(self.gate)}


def short(source: str) -> str:
    """A set's name."""
    return Path(source).stem


def make_bridge(gate: GateJob, spec: BridgeSpec, any_model: bool = False) -> BridgeJob:
    """Everything that can be refused before anything runs; needs the tokenizer and the config, not the weights.

    Args:
        any_model: masks of other weights pass, for a model that is not built yet; `with_weights` looks again.

    Raises:
        UserError: what scoring, a mask file or a set raises; names that clash; counts out of range; a mask of other weights.
    """
    model, sources = gate.model, (spec.prune, *spec.prune_controls)
    _check(spec, sources)
    masks = {short(one): read_mask(one) for one in sources if one.endswith(MASK_FILE)}
    for mask in masks.values():
        check_mask(model, mask, any_model)
    sets = {short(one): one for one in sources if not one.endswith(MASK_FILE)}
    rows = {name: _rows(one, "train", spec.score_limit) for name, one in sets.items()}
    tested = {name: _rows(one, HELDOUT, spec.test_limit) for name, one in sets.items()}
    preserve = chosen(spec.preserve, "train", spec.score_limit) if sets else []
    tested[short(spec.preserve)] = chosen(spec.preserve, HELDOUT, spec.test_limit)
    for name, ours in {**rows, short(spec.preserve): preserve}.items():
        _check_apart(name, ours, tested[name])
    scored = {}
    for name, ours in rows.items():
        kinds, kept = (("behaviour_signed",), []) if scored else (scoring.USUAL, preserve)
        scored[name] = scoring.make_job(model, ours, kept, kinds=kinds, form=spec.prune_form)
    text = gate.request.spec.text
    contents = digest([row for part in (*rows.values(), preserve, *tested.values()) for row in part], read_text(text) if text else "")
    tests = make_tests(model, tested, text, form=spec.prune_form)
    heads = make_job(model, gate.pairs, gate.request.sweep(units=("head_out",)), gate.source_model)
    return BridgeJob(gate, spec, scored, masks, tests, heads, contents)


def _rows(source: str, split: str, limit: int) -> list[Example]:
    return harmful(source, chosen(source, split))[:limit]


def _check(spec: BridgeSpec, sources: tuple[str, ...]) -> None:
    Rule(q=spec.q, p=spec.p).check()
    counts = {"--score-limit": spec.score_limit, "--test-limit": spec.test_limit, "--mediators": spec.mediators}
    counts |= {"--prune-pairs": spec.prune_pairs, "--prune-draws": spec.prune_draws}
    for flag, number in counts.items():
        if number < 1:
            raise UserError(f"{flag} {number} is too few; give 1 or more.")
    if spec.prune_draws > MOST_DRAWS:
        raise UserError(f"--prune-draws {spec.prune_draws} is out of range: whole numbers from 1 to {MOST_DRAWS:,}.")
    names = [short(one) for one in (*sources, spec.preserve)]
    clash = [name for name in names if names.count(name) > 1 or name in TAKEN]
    if clash:
        raise UserError(f"Results are named after the sets: {clash[0]!r} comes twice, or is a name of ours ({', '.join(TAKEN)}).")


def _check_apart(name: str, scored: list[Example], tested: list[Example]) -> None:
    both = {(row.prompt, row.response) for row in scored} & {(row.prompt, row.response) for row in tested}
    if both:
        fix = "so nothing is held out. Give its rows a column split, with train and heldout."
        raise UserError(f"{name}: {len(both)} rows would be scored and tested, {fix}")
