"""The command `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from jaxmed.cli import show
from jaxmed.cli.edits import EditFlags
from jaxmed.cli.flags import ConfigFlags, FormFlag, ModelFlags
from jaxmed.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Generate(ModelFlags, FormFlag, EditFlags, ConfigFlags):
    """Continues prompts: user messages through the chat template, or another --form."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts to continue, one or several."""
    examples: str = ""
    """Examples file (column prompt) or bundled set, instead of prompts."""
    tokens: int = 64
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """Temperature of sampling; 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this."""
    seed: int = 0
    """Seed of the sampling."""
    prefill: str = ""
    """Opening of every answer, which the model continues."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends, besides the model's own end."""

    def run(self) -> None:
        """Writes, and prints each prompt with its answer."""
        from jaxmed.generation import generate
        from jaxmed.prompts import Example, read_examples

        rows = read_examples(self.examples, responses=False) if self.examples else [Example(prompt) for prompt in self.prompts]
        if not rows:
            raise UserError("Give at least one prompt, or --examples FILE.")
        rows = [replace(row, prefill=self.prefill or row.prefill) for row in rows]
        edits = self._check(rows)
        model = self.load()
        how = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "stop_texts": self.stop, **edits}
        for row, text in zip(rows, generate(model, rows, self.tokens, self.form, **how), strict=True):
            show.out.print(f"> {row.prompt}\n{row.prefill}{text if row.prefill else text.strip()}\n", markup=False)

    def _check(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The edits, once settings and prompts can be used; loads no weights."""
        if self.tokens < 1:
            raise UserError(f"--tokens {self.tokens} leaves nothing to generate. Give 1 or more.")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise UserError(f"--temperature ({self.temperature:g}) is 0 or more, and --top-p ({self.top_p:g}) above 0 and at most 1.")
        model = self.describe()
        return self.how(model, rows, self.form, self.tokens)
