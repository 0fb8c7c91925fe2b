"""The folder of a fine-tuning run: what may lie in it, and its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmed.files import write_csv
from jaxmed.finetuning import checkpoint
from jaxmed.runs.legal import Legal

LOSSES, CURVE = "losses.csv", "losses.html"
COLUMNS = ("step", "epoch", "loss", "heldout_loss", "gradient_norm", "learning_rate", "scored_tokens")
LEGAL = Legal((LOSSES, CURVE, "adapter", "model"), begins=(checkpoint.BEGINS, "adapter.partial-", "model.partial-"))
"""What the folder may hold."""


def write_losses(out: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes losses.csv, whole or not at all; what was not measured is an empty cell."""
    write_csv(out / LOSSES, [{key: None if value != value else value for key, value in row.items()} for row in rows], COLUMNS)
