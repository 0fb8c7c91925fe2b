"""The command `generate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype, load_model, masked
from jaxmed.errors import UserError
from jaxmed.models.catalog import DEFAULT


@dataclass(frozen=True)
class Generate:
    """Continues prompts: user messages through the chat template, or plain text with --raw."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The prompts."""
    examples: str = ""
    """Examples file (column prompt) or bundled set, instead of prompts."""
    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    tokens: int = 64
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the most likely token; above, tokens are sampled."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this."""
    seed: int = 0
    """Of sampling."""
    prefill: str = ""
    """Opening of every answer, which the model goes on from."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends, besides the model's own end."""
    mask: Path | None = None
    """Mask file whose weights are set to zero in memory; see `jaxmed prune`."""
    adapter: Path | None = None
    """LoRA adapter to merge into the weights, as the folder that PEFT saves."""
    raw: bool = False
    """Feed plain text, without the chat template."""
    dtype: Dtype = "float32"
    """Weights and matmuls."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    config: Config = None

    def run(self) -> None:
        """Writes, and prints each prompt with its answer."""
        from jaxmed.generation import generate
        from jaxmed.prompts import Example, read_examples

        rows = read_examples(self.examples, responses=False) if self.examples else [Example(prompt) for prompt in self.prompts]
        if not rows:
            raise UserError("Give at least one prompt, or --examples FILE.")
        rows = [replace(row, prefill=self.prefill or row.prefill) for row in rows]
        model = masked(load_model(self.model, self.dtype, None, self.mesh, adapter=self.adapter), self.mask)
        how = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "stop_texts": self.stop}
        for row, text in zip(rows, generate(model, rows, self.tokens, "text" if self.raw else "chat", **how), strict=True):
            show.out.print(f"> {row.prompt}\n{row.prefill}{text if row.prefill else text.strip()}\n", markup=False)
