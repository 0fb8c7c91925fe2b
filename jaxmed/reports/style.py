"""How numbers, texts and figures look: 3 significant digits, visible control characters, colour-blind safe colours."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import plotly.graph_objects as go

from jaxmed.errors import visible

MISSING = "\u2013"
INK, GRID, EMPTY = "#1f2933", "#e4e7eb", "#f1f3f5"
CATEGORICAL = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#4D4D4D", "#999933", "#882255")
"""Okabe and Ito's, without yellow, and two of Tol's: ten, as many as the bundled pairs have categories."""
DIVERGING = [
    [0.0, "#08519c"],
    [0.15, "#2f7bbf"],
    [0.3, "#67a9cf"],
    [0.45, "#d7e8f1"],
    [0.5, "#ffffff"],
    [0.55, "#fde3d3"],
    [0.7, "#ef8a62"],
    [0.85, "#cb3a2f"],
    [1.0, "#99000d"],
]
SEQUENTIAL = [[0.0, "#ffffff"], [0.25, "#cfe1f2"], [0.5, "#6aaed6"], [0.75, "#2070b4"], [1.0, "#08306b"]]


@dataclass(frozen=True)
class Figure:
    """A figure of the page; title and caption are plain text."""

    title: str
    caption: str
    plot: go.Figure


def number(value: float | str | None, missing: str = MISSING) -> str:
    """A number to 3 significant digits; `missing` for NaN and for what is no number."""
    try:
        value = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return missing
    if not math.isfinite(value):
        return missing
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:#.3g}".removesuffix(".")


def percent(value: float | str | None) -> str:
    """A share in percent, to 3 significant digits; `MISSING` as in `number`."""
    return MISSING if number(value) == MISSING else f"{number(100 * float(value))} %"  # type: ignore[arg-type]


def count(amount: int, noun: str) -> str:
    """`3 pairs`, `1 pair`."""
    return f"{amount:,} {noun if amount == 1 else noun.removesuffix('y') + 'ies' if noun.endswith('y') else noun + 's'}"


def label(text: object) -> str:
    """A text for plotly, whose labels read HTML tags."""
    return html.escape(visible(str(text)), quote=False)


def spans(layers: list[int]) -> str:
    """Layers in words: `0-3, 9`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def canvas(height: int, x: str, y: str) -> go.Figure:
    """An empty figure in the page's style, `height` pixels high, with axis titles."""
    axis = {"gridcolor": GRID, "linecolor": "#9aa5b1", "zeroline": False, "ticks": "outside", "tickcolor": "#9aa5b1", "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 60, "r": 20, "t": 12, "b": 48},
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 13, "color": INK},
            "xaxis": {**axis, "title": {"text": x}},
            "yaxis": {**axis, "title": {"text": y}},
            "hoverlabel": {"font": {"size": 12}},
            "plot_bgcolor": "#ffffff",
            "paper_bgcolor": "#ffffff",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        }
    )
