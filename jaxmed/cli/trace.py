"""The command `trace`: where in the prompt, and at which layer, an effect runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmed.cli.sweep import Sweep
from jaxmed.errors import UserError, hint


@dataclass(frozen=True, kw_only=True)
class Trace(Sweep):
    """Layer by token: what attention, the MLP, both, every head and the residual stream carry at each token of a prompt, or at named spans
    of many prompts (columns span_NAME of the pairs file). A sweep whose flags begin with other defaults."""

    unit: tuple[str, ...] = ("attention_out", "mlp_out", "both_out", "residual_out", "head_out")
    """One or several of: neuron, gate, up (a gated neuron's two branches), window, head_out, attention_out, mlp_out, both_out (these two of
    a layer together), residual_out."""
    position: str = "each"
    """each: every token by itself; spans: the tokens of each named span together, the rest of the request, and the header."""
    pair: tuple[str, ...] = ()
    """Ids of the pairs to trace; empty: all. A page of one pair has its tokens on the axis."""
    out: Path = Path("jaxmed-trace")
    """Folder for effects.zarr, run.json, top.csv and report.html."""

    def among(self, source: str, pairs: Sequence[Any]) -> Sequence[Any]:
        """The pairs that are asked for."""
        known = [pair.id for pair in pairs]
        for name in self.pair:
            if name not in known:
                raise UserError(
                    f"{source} has no pair {name!r}.{hint(name, known)} It has {len(known)}, from {known[0]!r} to {known[-1]!r}."
                )
        return [pair for pair in pairs if pair.id in self.pair] if self.pair else pairs
