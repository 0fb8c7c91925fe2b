"""The loss curve of a fine-tuning run, from its losses.csv."""

from __future__ import annotations

import csv
from pathlib import Path

import plotly.graph_objects as go

from jaxmed.reports.style import CATEGORICAL, canvas


def write_loss_curve(table: Path, out: Path) -> Path:
    """Draws losses per step, and the held-out losses, as one HTML file that works offline; returns its path."""
    with table.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    figure = canvas(420, "optimiser step", "loss, nats per response token")
    steps = [int(row["step"]) for row in rows]
    figure.add_trace(go.Scatter(x=steps, y=[float(row["loss"]) for row in rows], name="training batch", line={"color": CATEGORICAL[0]}))
    held = [row for row in rows if row["heldout_loss"]]
    if held:
        x, y = [int(row["step"]) for row in held], [float(row["heldout_loss"]) for row in held]
        figure.add_trace(go.Scatter(x=x, y=y, name="held out", mode="lines+markers", line={"color": CATEGORICAL[1]}))
    partial = out.with_name(out.name + ".tmp")
    figure.write_html(partial, include_plotlyjs=True)
    partial.replace(out)
    return out
