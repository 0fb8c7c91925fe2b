"""The figures of the bridge between mediation and pruning, from its saved tables alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from jaxmed.files import read_csv
from jaxmed.reports.style import CATEGORICAL, INK, Figure, canvas, label, number

Rows = Sequence[dict[str, str]]
TABLES = ("enrichment.csv", "correlations.csv", "effects.csv", "pruned.csv")
"""Tables that the page shows; units.csv and pruned-pairs.csv are too long for it."""
ENRICHED = (
    "Weights removed at the units that mediate, over those expected of as many random weights per matrix and of like size (strata of |W|). "
    "1: no more than chance. Control behaviours are scaled to the same counts per matrix. Bars: 95 % intervals over mediating units."
)
SCATTER = (
    "Removed weights of every unit against the size of its mean effect; those that heads share are split evenly. Spearman's rank "
    "correlation: {removed} with the number of weights, {score} with their summed |score|, {norm} with the unit's norm."
)
LEFT = (
    "Part of the mean total that is left without some weights: with the whole mask, with its part at the mediating units and with the rest "
    "of it; without all that the mediating neurons write, or random neurons of like size; and with other masks. Bars: 95 % intervals."
)


def bridge_figures(folder: Path) -> list[Figure]:
    """The figures of a bridge's folder; none where it is not finished."""
    if not (folder / "verdicts.csv").is_file():
        return []
    rows, units = read_csv(folder / "enrichment.csv"), read_csv(folder / "units.csv")
    found = [Figure("Do removed weights sit at the units that mediate", ENRICHED, _draw_enriched(rows))]
    for row in read_csv(folder / "correlations.csv"):
        mine = [one for one in units if one["unit"] == row["unit"] and row["layer"] in (one["layer"], "all")]
        name = f"neurons of layer {row['layer']}" if row["unit"] == "neuron" else "heads"
        caption = SCATTER.format(**{of: number(row[f"{of}_rho"]) for of in ("removed", "score", "norm")})
        found.append(Figure(f"Removed weights and effects: {name}", caption, _draw_units(mine)))
    return [*found, Figure("The total without some weights", LEFT, _draw_left(read_csv(folder / "pruned.csv")))]


def _ends(rows: Rows, value: str, low: str, high: str) -> dict[str, Any]:
    """Error bars; none where there is no interval."""
    above = [_float(row[high]) - _float(row[value]) for row in rows]
    below = [_float(row[value]) - _float(row[low]) for row in rows]
    return {"type": "data", "symmetric": False, "thickness": 1, "array": above, "arrayminus": below}


def _float(cell: str) -> float:
    return float(cell) if cell else float("nan")


def _draw_enriched(rows: Rows) -> go.Figure:
    figure = canvas(380, "removed over expected weights at mediating units", "")
    for at, mask in enumerate(dict.fromkeys(row["mask"] for row in rows)):
        mine = [row for row in rows if row["mask"] == mask]
        figure.add_trace(
            go.Bar(
                y=[row["scope"] for row in mine],
                x=[_float(row["ratio_by_norms"]) for row in mine],
                error_x=_ends(mine, "ratio_by_norms", "norms_low", "norms_high"),
                orientation="h",
                name=label(mask),
                marker={"color": CATEGORICAL[at % len(CATEGORICAL)]},
                customdata=[[row["at_mediators"], row["removed"], number(row["ratio_by_counts"]), number(row["p"])] for row in mine],
                hovertemplate="%{y}: %{x:.3g}<br>%{customdata[0]} of %{customdata[1]} weights<br>by counts alone %{customdata[2]}"
                "<br>p %{customdata[3]}<extra>%{fullData.name}</extra>",
            )
        )
    figure.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(legend={"y": -0.3, "yanchor": "top"})
    return figure


def _draw_units(rows: Rows) -> go.Figure:
    figure = canvas(400, "|mean effect|", "weights removed for the behaviour")
    for at, (mark, name) in enumerate((("0", "other units"), ("1", "mediating units"))):
        mine = [row for row in rows if row["mediates"] == mark]
        figure.add_trace(
            go.Scatter(
                x=[abs(float(row["effect"])) for row in mine],
                y=[float(row["removed_behaviour"]) for row in mine],
                mode="markers",
                name=name,
                marker={"color": CATEGORICAL[at], "size": 6, "opacity": 0.7},
                customdata=[[row["layer"], row["index"], number(row["effect"]), number(row["by_norms"])] for row in mine],
                hovertemplate="layer %{customdata[0]}, unit %{customdata[1]}<br>effect %{customdata[2]}<br>%{y:.3g} weights, "
                "%{customdata[3]} expected<extra></extra>",
            )
        )
    return figure


def _draw_left(rows: Rows) -> go.Figure:
    figure = canvas(120 + 28 * len(rows), "part of the total that is left", "")
    told = [[row["weights"], number(row.get("perplexity_ratio", "")), number(row.get("base_score", ""))] for row in rows]
    figure.add_trace(
        go.Bar(
            y=[label(row["mask"]) for row in rows],
            x=[_float(row["part"]) for row in rows],
            error_x=_ends(rows, "part", "part_low", "part_high"),
            orientation="h",
            marker={"color": CATEGORICAL[0]},
            customdata=told,
            hovertemplate="%{y}: %{x:.3g}<br>%{customdata[0]} weights<br>perplexity times %{customdata[1]}<br>score of answers to base "
            "prompts %{customdata[2]}<extra></extra>",
        )
    )
    figure.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure
