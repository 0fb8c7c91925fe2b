"""The command `check`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags
from jaxmed.cli.sweep import SweepFlags


@dataclass(frozen=True, kw_only=True)
class Check(SweepFlags, ConfigFlags):
    """Checks a pairs file against a model, all pairs at once; reads config and tokenizer, no weights.

    Prints how every pair tokenises; exit code 2 where a pair cannot be swept.
    """

    pairs: Annotated[str, tyro.conf.Positional] = "harm"
    """Pairs file to check (.jsonl, .json, .csv, .tsv, .parquet), or a bundled set: harm, control, facts."""

    def run(self) -> None:
        """Reads, tokenises, counts."""
        pairs, job = self.checked(self.pairs, self.job)
        tokens = [len(one.base.ids) for one in job.contrasts]
        shorter = sum(len(one.base.ids) != len(one.source.ids) for one in job.contrasts)
        groups = ", ".join(f"{count} {name or 'without a category'}" for name, count in Counter(pair.category for pair in pairs).items())
        lines = [
            f"{len(pairs)} pairs are in order for {job.model.name}: {groups}",
            f"base prompts have {min(tokens)} to {max(tokens)} tokens; base and source differ in length in {shorter} pairs",
            f"answers are of the outcome{'s' * (len(self.outcome) > 1)} {', '.join(self.outcome)}; patched tokens: {self.position}",
        ]
        show.lines(f"check: {self.pairs}", lines)
