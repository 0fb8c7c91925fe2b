"""Flags and prompts of the commands that learn from labelled prompts, or are tested on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.errors import UserError

HARMFUL, BENIGN = "harmful", "benign"


@dataclass(frozen=True, kw_only=True)
class LabelledFlags:
    """Labelled prompts."""

    examples: str = "alignment"
    """Prompts (.jsonl, .csv, .parquet; columns prompt, kind: harmful or benign), or a bundled set: alignment."""
    prompts: int = 200
    """Prompts of each kind at most, drawn at random."""

    def labelled(self, split: str, seed: int = 0) -> tuple[list[Any], list[Any]]:
        """Benign and harmful examples of a split.

        Raises:
            UserError: no rows of a kind; rows of other kinds alone; fewer than one prompt asked for.
        """
        from jaxmed.prompts.examples import chosen

        if self.prompts < 1:
            raise UserError(f"--prompts {self.prompts} leaves none; give 1 or more.")
        rows = chosen(self.examples, split, None, responses=False)
        sides = tuple([row for row in rows if row.kind == kind] for kind in (BENIGN, HARMFUL))
        for kind, side in zip((BENIGN, HARMFUL), sides, strict=True):
            if not side:
                raise UserError(f"{self.examples} holds no rows of kind {kind!r} in split {split!r}. Name the kinds in the column `kind`.")
        rng = np.random.default_rng(seed)
        drawn = tuple([side[i] for i in sorted(rng.permutation(len(side))[: self.prompts])] for side in sides)
        return drawn[0], drawn[1]


def ids_of(model: Any, sides: Sequence[Sequence[Any]], form: str, more: int = 0) -> list[list[np.ndarray]]:
    """Token ids int [T] of every prompt; needs no weights.

    Args:
        more: tokens that are read behind each at most.

    Raises:
        UserError: prompts that the model cannot read.
    """
    from jaxmed.probing.prefixes import prompts_of
    from jaxmed.tokens import check_tokens

    found = [prompts_of(model, side, form) for side in sides]
    check_tokens(model.config, [ids for side in found for ids in side], "A prompt", model.tokenizer, more)
    return found


def longest(prefixes: Any) -> int:
    """Tokens of the longest opening."""
    return max(len(one.ids) for one in prefixes.prefixes)
