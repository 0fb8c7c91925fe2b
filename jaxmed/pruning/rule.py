"""The rules by which weights are chosen. No JAX.

The rule of Orgad et al. 2026 is the default: U = the top int(p * size) entries of A (preserve, absolute), H = the top int(q * size)
entries of -S (behaviour, signed), per matrix, flattened; the mask is H without U.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmed.errors import UserError, unknown

ScoreName = Literal["signed", "positive", "absolute", "wanda", "magnitude", "random"]
SCORES: dict[str, str] = {
    "signed": "-S on the behaviour set: removal raises its loss",
    "positive": "+S on the behaviour set: to first order removal lowers its loss",
    "absolute": "A on the behaviour set (absolute SNIP)",
    "wanda": "|W| times the root mean square of the inputs on the behaviour set",
    "magnitude": "the smallest |W|",
    "random": "uniform, by the seed",
}
SPARED = ("absolute", "wanda", "none")
RANKINGS = ("matrix", "row", "global")


@dataclass(frozen=True)
class Rule:
    """How weights are chosen."""

    q: float = 1e-3
    """Fraction of weights that are chosen, of each matrix, row, or of all (see --ranking); int(q * size) of them."""
    p: float = 5e-3
    """Fraction of weights that are spared, ranked by the preserve score in the same way; 0: none."""
    score: ScoreName = "signed"
    """Score that ranks weights. signed: -S; positive: +S; absolute: absolute SNIP; wanda; magnitude: smallest |W|; random."""
    spare: Literal["absolute", "wanda", "none"] = "absolute"
    """Preserve score by which weights are spared."""
    ranking: Literal["matrix", "row", "global"] = "matrix"
    """Where weights are ranked: within their matrix, within the row of their output, or all together (global)."""
    skip: float = 0.0
    """Fraction of the highest ranked weights that are skipped before q are chosen."""
    layers: tuple[int, ...] = ()
    """Layers whose matrices may be chosen from, such as 9,19,20-29; empty: all."""
    matrices: tuple[str, ...] = ()
    """Matrices by the last part of their names, such as down_proj; empty: all."""
    seed: int = 0
    """Seed of random scores, for --score random."""

    def check(self) -> None:
        """Raises a UserError for values that cannot be used."""
        if not 0 < self.q <= 1 or not 0 <= self.p < 1 or not 0 <= self.skip < 1:
            raise UserError(f"q ({self.q}) is in (0, 1], p ({self.p}) in [0, 1), where 0 spares nothing, and skip ({self.skip}) in [0, 1).")
        if self.skip + self.q > 1:
            raise UserError(f"skip ({self.skip}) and q ({self.q}) together exceed 1.")
        for what, value, legal in (("score", self.score, SCORES), ("spare", self.spare, SPARED), ("ranking", self.ranking, RANKINGS)):
            if value not in legal:
                raise unknown(what, value, legal)
