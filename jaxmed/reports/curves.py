"""Curves from saved tables: the losses of fine-tuning, what pruning does by share of weights, and its transfer between behaviours."""

from __future__ import annotations

import csv
from pathlib import Path

import plotly.graph_objects as go

from jaxmed.reports.style import CATEGORICAL, DIVERGING, canvas


def write_loss_curve(table: Path, out: Path) -> Path:
    """Draws losses per step, and the held-out losses, as one HTML file that works offline; returns its path."""
    rows = _read(table)
    figure = canvas(420, "optimiser step", "loss, nats per response token")
    steps = [int(row["step"]) for row in rows]
    figure.add_trace(go.Scatter(x=steps, y=[float(row["loss"]) for row in rows], name="training batch", line={"color": CATEGORICAL[0]}))
    held = [row for row in rows if row["heldout_loss"]]
    if held:
        x, y = [int(row["step"]) for row in held], [float(row["heldout_loss"]) for row in held]
        figure.add_trace(go.Scatter(x=x, y=y, name="held out", mode="lines+markers", line={"color": CATEGORICAL[1]}))
    return _write(figure, out)


def _write(figure: go.Figure, out: Path) -> Path:
    partial = out.with_name(out.name + ".tmp")
    figure.write_html(partial, include_plotlyjs=True)
    partial.replace(out)
    return out


def _read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def write_pruning_curve(table: Path, out: Path) -> Path:
    """Draws the rise of every test set's loss against the share q of chosen weights, a dash per rule, a colour per set; 95 % bars."""
    rows = [row for row in _read(table) if row["rule"] != "none"]
    names = [column.removesuffix("_rise") for column in rows[0] if column.endswith("_rise")]
    figure = canvas(480, "share q of weights chosen per matrix", "rise of the loss, nats per response token")
    figure.update_xaxes(type="log")
    for number, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        for colour, name in enumerate(names):
            of_rule = [row for row in rows if row["rule"] == rule]
            qs = sorted({float(row["q"]) for row in of_rule})
            groups = [[row for row in of_rule if float(row["q"]) == q] for q in qs]
            mean = [sum(float(row[f"{name}_rise"]) for row in group) / len(group) for group in groups]
            low, high = ([float(group[0][f"{name}_{side}"]) for group in groups] for side in ("low", "high"))
            line = {"color": CATEGORICAL[colour % len(CATEGORICAL)], "dash": DASHES[number % len(DASHES)]}
            above, below = ([abs(edge - at) for edge, at in zip(edges, mean, strict=True)] for edges in (high, low))
            errors = {"array": above, "arrayminus": below}
            bars = {"type": "data", "symmetric": False, "thickness": 1, **errors} if len(groups[0]) == 1 else None
            figure.add_trace(go.Scatter(x=qs, y=mean, name=f"{name}, {rule}", mode="lines+markers", line=line, error_y=bars))
    return _write(figure, out)


def write_transfer(table: Path, out: Path) -> Path:
    """Draws a matrix: pruned for (rows), tested on (columns), colour the rise of the loss; random masks averaged."""
    rows = _read(table)
    names = [column.removesuffix("_rise") for column in rows[0] if column.endswith("_rise")]
    masks = list(dict.fromkeys(row["mask"] for row in rows))
    groups = [[row for row in rows if row["mask"] == mask] for mask in masks]
    rises = [[sum(float(row[f"{name}_rise"]) for row in group) / len(group) for name in names] for group in groups]
    most = max(abs(value) for line in rises for value in line) or 1.0
    figure = canvas(160 + 40 * len(masks), "tested on", "pruned for")
    text = [[f"{value:+.3f}" for value in line] for line in rises]
    heat = go.Heatmap(z=rises, x=names, y=masks, text=text, texttemplate="%{text}", colorscale=DIVERGING, zmin=-most, zmax=most)
    figure.add_trace(heat)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _write(figure, out)
