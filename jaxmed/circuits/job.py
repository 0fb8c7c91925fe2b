"""A request for circuits before it runs, checked against model and pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from jaxmed.circuits.curve import FRACTIONS
from jaxmed.circuits.formats import Scored
from jaxmed.circuits.graph import Graph, check_graph, graph_of
from jaxmed.circuits.rows import RowShape, check_equal, shape_of
from jaxmed.circuits.spec import CircuitSpec
from jaxmed.effects.contrast import Contrast, Reading, make_contrasts
from jaxmed.effects.job import manifest_of
from jaxmed.effects.outcomes import OUTCOMES, OutcomeName, check_outcomes, outcome_name
from jaxmed.errors import UserError, all_problems
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair

FILE = "file"
"""What scores that were read and not computed are called."""


@dataclass(frozen=True)
class CircuitJob:
    """A checked request.

    Attributes:
        pairs, contrasts: control pairs have been left out.
        given: scores that were read from a file; then none are computed.
    """

    model: Model
    pairs: tuple[PromptPair, ...]
    spec: CircuitSpec
    contrasts: tuple[Contrast, ...]
    outcome: OutcomeName
    contrast: str
    form: str
    given: Scored | None = None

    @cached_property
    def graph(self) -> Graph:
        return graph_of(self.model.config)

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the scores."""
        return self.spec.method if self.given is None else (FILE,)

    @property
    def ranked(self) -> bool:
        """Whether there are scores to rank by; a file may hold a circuit alone."""
        return self.given is None or self.given.ranked(self.spec.of_nodes)

    @property
    def marked(self) -> int:
        """Edges (nodes) of the circuit that is marked; of a file without scores, the edges of its circuit."""
        return self.spec.size if self.ranked or self.given is None else int(self.given.chosen.sum())

    @property
    def scored(self) -> list[int]:
        """Numbers of the pairs that edges are scored on; of given scores, those that say which sign is base's."""
        return self._of("discovery")

    @property
    def measured(self) -> list[int]:
        """Numbers of the pairs that circuits are run on."""
        return self._of("heldout")

    def _of(self, split: str) -> list[int]:
        return [at for at, pair in enumerate(self.pairs) if not self.spec.apart or pair.split == split]

    @property
    def parts(self) -> list[float]:
        """Where gradients are taken for all methods together."""
        return sorted({part for method in self.spec.method for part in self.spec.parts(method)}) if self.given is None else []

    @property
    def items(self) -> int:
        """How many edges, or nodes, there are to choose from."""
        return len(self.graph.senders if self.spec.of_nodes else self.graph.places)

    @property
    def rewires(self) -> bool:
        """Whether circuits are compared with rewired ones: those of edges."""
        return self.ranked and not self.spec.of_nodes

    @property
    def circuits(self) -> int:
        """How many circuits each pair runs: all edges, none, and of every curve its sizes and the one that is marked."""
        controls = self.spec.random * (1 + self.rewires)
        curves = 2 * len(self.methods) * self.ranked + controls
        return 2 + (len(FRACTIONS) - 1) * curves + len(self.methods) + controls

    def shape(self, pair: int) -> RowShape:
        """The sizes of a pair's programs."""
        return shape_of(self.contrasts[pair])

    def with_weights(self, model: Model) -> CircuitJob:
        """The job on a model that has weights."""
        contrasts = tuple(
            replace(one, base=replace(one.base, model=model), source=replace(one.source, model=model)) for one in self.contrasts
        )
        return replace(self, model=model, contrasts=contrasts)

    def manifest(self) -> dict[str, Any]:
        """What makes two requests the same."""
        given = self.given
        parts = () if given is None else (given.edges, given.nodes, given.chosen)
        digest = {"scores": hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()} if parts else {}
        return {
            "circuit": {**asdict(self.spec), "outcome": outcome_name(self.outcome)},
            "contrast": self.contrast,
            "form": self.form,
            **digest,
            **manifest_of(self.model, self.pairs, self.contrasts),
        }


def make_circuits(
    model: Model,
    pairs: Sequence[PromptPair],
    spec: CircuitSpec,
    outcome: OutcomeName = "log-odds",
    contrast: str = "pair",
    form: str = "chat",
    given: Scored | None = None,
) -> CircuitJob:
    """Everything that can be refused before anything runs; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: no pairs but controls; a model whose heads do not add up; pairs of unequal lengths, all of them together; an outcome
            without a gradient; numbers out of range; scores of another model's graph.
    """
    spec.check()
    graph = graph_of(model.config)
    _check_outcome(outcome, model.config.vocabulary)
    counted = tuple(pair for pair in pairs if not pair.control)
    if not counted:
        raise UserError("There are no pairs to find a circuit of (control pairs do not count).")
    if contrast == "model":
        raise UserError("Circuits compare two prompts in one model. Use --contrast pair or prefill.")
    contrasts = make_contrasts(model, counted, Reading(contrast, "last", form, (outcome,)))
    _check_lengths(contrasts)
    job = CircuitJob(model, counted, spec, contrasts, outcome, contrast, form, given)
    if spec.apart and not (job.scored and job.measured):
        raise UserError("--apart needs pairs of both splits: a column 'split' with discovery and heldout.")
    if given is not None:
        check_graph(given.graph, graph)
    if spec.size > job.items:
        what = "--nodes" if spec.of_nodes else "--edges"
        raise UserError(f"{what} {spec.size:,} is more than this model has: {job.items:,}. Give fewer.")
    return job


def _check_outcome(outcome: OutcomeName, vocabulary: int) -> None:
    check_outcomes([outcome], vocabulary)
    if isinstance(outcome, str) and not OUTCOMES[outcome].differentiable:
        legal = ", ".join(name for name, one in OUTCOMES.items() if one.differentiable)
        raise UserError(f"Edges are scored by the outcome's gradient, and that of {outcome!r} says nothing at base. Use one of: {legal}.")


def _check_lengths(contrasts: Sequence[Contrast]) -> None:
    problems = []
    for contrast in contrasts:
        try:
            check_equal(contrast)
        except UserError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise all_problems("pairs", problems)
