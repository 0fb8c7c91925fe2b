"""The settings of prefix probing; they are the commands' flags, too."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxmed.errors import UserError, check_seed


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """Beam search for the openings that tell benign from harmful prompts best."""

    beams: int = 8
    """Openings that are kept of every length, of each kind."""
    length: int = 4
    """Tokens of an opening at most."""
    keep: int = 4
    """Openings of each kind in the result."""
    floor: float = 4.0
    """An opening is plausible where it costs this many nats per token at most, on average over the prompts that it is typical of."""

    def check(self) -> None:
        """Raises a UserError for numbers out of range."""
        if min(self.beams, self.length, self.keep) < 1 or not 0 < self.floor < math.inf:
            given = f"--beams {self.beams}, --length {self.length} and --keep {self.keep}"
            raise UserError(f"{given} are at least 1, and --floor {self.floor:g} is positive.")


@dataclass(frozen=True, kw_only=True)
class FitSpec:
    """How scores become a probe."""

    fpr: float = 0.05
    """Benign prompts that may be flagged, as a fraction: the threshold is that quantile of their scores."""
    folds: int = 5
    """Parts of the prompts, each of which is tested with a threshold from the others."""
    seed: int = 0
    """Seed of the folds."""

    def check(self) -> None:
        """Raises a UserError for numbers out of range."""
        check_seed(self.seed)
        if not 0 < self.fpr < 1 or self.folds < 2:
            raise UserError(f"--fpr {self.fpr:g} is between 0 and 1, and --folds {self.folds} is at least 2.")
