"""What decides the numbers of `jaxmed answers`, beside model, pairs and sets; it is the command's flags, too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxmed.errors import UserError, check_seed, quoted, unknown

MOST = 10**6
PATCHES, EDITED = ("resample", "mean", "zero"), ("both", "prompt", "generated")


@dataclass(frozen=True, kw_only=True)
class AnswersSpec:
    """How prompts are answered, and what is written in the place of a unit's value meanwhile."""

    patch: Literal["resample", "mean", "zero"] = "resample"
    """What a unit keeps: resample, its value at the end of the pair's source prompt, or, with a source model, that model's value at every
    token of the text so far; mean, its mean over the ends of all source prompts; zero."""
    edited: Literal["both", "prompt", "generated"] = "both"
    """Tokens at which units are patched: the prompt's last one, every written one, or both."""
    tokens: int = 32
    """Tokens of an answer at most."""
    samples: int = 1
    """Answers to every prompt; more than one needs a temperature."""
    temperature: float = 0.0
    """0: the most likely token is written; above: tokens are sampled."""
    top_p: float = 1.0
    """Samples are among the fewest tokens whose probabilities reach this."""
    random: int = 1
    """Random sets beside each: as many units of the same kinds and layers, drawn among the others."""
    seed: int = 0
    """Seed of the samples, which are drawn alike under all patches, and of the random sets."""

    def check(self) -> None:
        """Raises a UserError for values out of range."""
        for name, legal in (("patch", PATCHES), ("edited", EDITED)):
            if getattr(self, name) not in legal:
                raise unknown(name, getattr(self, name), legal)
        check_seed(self.seed)
        for name, least in (("tokens", 1), ("samples", 1), ("random", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= MOST:
                raise UserError(f"--{name} {quoted(value)} is out of range: whole numbers from {least} to {MOST:,}.")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise UserError(f"--temperature {self.temperature} is not negative, and --top-p {self.top_p} is in (0, 1].")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"--samples {self.samples} of greedy answers are all the same: give a --temperature above 0.")
