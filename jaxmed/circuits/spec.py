"""What decides the numbers of `jaxmed circuit`, beside model, pairs and outcome; it is the command's flags, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxmed.errors import UserError, check_seed, quoted, unknown

METHODS = ("eap", "eap-ig")


@dataclass(frozen=True, kw_only=True)
class CircuitSpec:
    """How edges are scored, and which circuits are run."""

    method: tuple[Literal["eap", "eap-ig"], ...] = ("eap-ig",)
    """How edges are scored, one or both of: eap, the change of what an edge carries times the gradient at base; eap-ig, that change times
    the mean gradient over points between the embedded prompts of source and base."""
    points: int = 5
    """Points of eap-ig: k / points of the way from source to base, k = 1 to points."""
    edges: int = 200
    """Edges of the circuit that the scores' file marks: the best ones by |score|."""
    nodes: int = 0
    """Nodes of the circuit that the scores' file marks, in place of --edges: circuits are then of whole nodes. 0: circuits of edges."""
    random: int = 3
    """Draws of every kind of random circuit: random, with as many edges (nodes), any of them; and rewired (circuits of edges alone), with
    as many edges into every input, from any nodes before it."""
    apart: bool = False
    """Score edges on pairs of the split discovery, and run circuits on those of heldout; otherwise both on all pairs."""
    seed: int = 0
    """Seed of the draws."""

    @property
    def size(self) -> int:
        """Edges or nodes of the circuit that is marked."""
        return self.nodes or self.edges

    @property
    def of_nodes(self) -> bool:
        """Whether circuits are of whole nodes."""
        return self.nodes > 0

    def parts(self, method: str) -> tuple[float, ...]:
        """Where a method takes gradients: parts of the way from source to base."""
        return (1.0,) if method == "eap" else tuple(number / self.points for number in range(1, self.points + 1))

    def check(self) -> None:
        """Raises a UserError for values out of range."""
        check_seed(self.seed)
        if not self.method or len(set(self.method)) < len(self.method):
            raise UserError("--method is given twice or not at all. Give eap, eap-ig, or both.")
        for method in self.method:
            if method not in METHODS:
                raise unknown("method", method, METHODS)
        limits: Sequence[tuple[str, int, int]] = (("points", 1, 1000), ("edges", 0, 10**9), ("nodes", 0, 10**6), ("random", 0, 1000))
        for name, least, most in limits:
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise UserError(f"--{name} {quoted(value)} is out of range: whole numbers from {least} to {most:,}.")
