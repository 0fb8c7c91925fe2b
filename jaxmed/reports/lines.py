"""Lines and dots: module effects by layer, outcomes of base and source by pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from jaxmed.reports.record import Record, labels, mean_effect, mean_total, select, shared_total, statistic, swept, totals, used_pairs
from jaxmed.reports.style import CATEGORICAL, MISSING, Figure, canvas, label, number, percent

MOST_PAIRS = 40
MOST_DUMBBELLS = 60
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "cross")


def profile(record: Record, outcome: str) -> Figure:
    """Mean effect of attention, MLP and whole layers by layer, with intervals and pairs; residual_out starts hidden."""
    plot = canvas(430, "layer", f"effect on {label(outcome)}")
    modules, carrying = record.shown("line", "carry"), record.shown("carry")
    pairs = len(used_pairs(record))
    bands = False
    for unit in modules:
        bands = _band(plot, record, unit, outcome) or bands
        if 1 < pairs <= MOST_PAIRS:
            _pairs(plot, record, unit, outcome)
        _line(plot, record, unit, outcome)
    plot.add_hline(y=0, line={"color": "#9aa5b1", "width": 1})
    plot.update_layout(hovermode="closest", showlegend=True)
    layers = swept(mean_effect(record, modules[0], outcome))["layer"].values
    plot.update_xaxes(dtick=1 if len(layers) <= 40 else None, showgrid=False, range=[layers.min() - 0.5, layers.max() + 0.5])
    parts = ["Mean effect over pairs of swapping a layer's whole attention output or MLP output."]
    parts += ["Bands are 95 % intervals of the mean."] if bands else []
    parts += [f"Thin lines are the {pairs} pairs."] if 1 < pairs <= MOST_PAIRS else []
    hidden = "is hidden at first, because it carries all that came before it (see the notes); click its name to show it."
    parts += [f"{unit} {hidden}" for unit in carrying]
    return Figure("Module effects by layer", " ".join(parts), plot)


def _look(record: Record, unit: str) -> dict[str, Any]:
    """What every trace of a module shares."""
    return {"legendgroup": unit, "visible": "legendonly" if unit in record.shown("carry") else True}


def _style(record: Record, unit: str) -> tuple[str, str, str]:
    """Colour, dash and symbol of a module, by its place among those of the page."""
    at = record.shown("line", "carry").index(unit)
    return CATEGORICAL[at % len(CATEGORICAL)], _DASHES[at % len(_DASHES)], _SYMBOLS[at % len(_SYMBOLS)]


def _band(plot: go.Figure, record: Record, unit: str, outcome: str) -> bool:
    low, high = (statistic(record, unit, outcome, name) for name in ("ci_low", "ci_high"))
    if low is None or high is None or not np.isfinite(low.values).any():
        return False
    layers, kept = low["layer"].values, np.isfinite(low.values)
    x = np.concatenate([layers[kept], layers[kept][::-1]])
    y = np.concatenate([high.values[kept], low.values[kept][::-1]])
    plot.add_scatter(
        x=x,
        y=y,
        fill="toself",
        mode="lines",
        line={"width": 0},
        fillcolor=_style(record, unit)[0],
        opacity=0.15,
        hoverinfo="skip",
        showlegend=False,
        **_look(record, unit),
    )
    return True


def _pairs(plot: go.Figure, record: Record, unit: str, outcome: str) -> None:
    effects = select(record.table[unit], outcome).transpose("pair", "layer")
    for pair in used_pairs(record):
        values = effects.isel(pair=pair).load()
        plot.add_scatter(
            x=values["layer"].values,
            y=values.values,
            mode="lines",
            line={"color": _style(record, unit)[0], "width": 0.8},
            opacity=0.25,
            showlegend=False,
            hovertemplate=f"{label(values['pair'].item())}<br>layer %{{x}}<br>{unit} %{{y:.3g}}<extra></extra>",
            **_look(record, unit),
        )


def _line(plot: go.Figure, record: Record, unit: str, outcome: str) -> None:
    mean, total = mean_effect(record, unit, outcome), shared_total(record, outcome)
    fields = [statistic(record, unit, outcome, name) for name in ("ci_low", "ci_high", "p")]
    low, high, p = (np.full(mean.shape, np.nan) if field is None else field.values for field in fields)
    shares = [percent(v / total) for v in mean.values]
    ranges = [f"[{number(a)}, {number(b)}]" if np.isfinite(a) else MISSING for a, b in zip(low, high, strict=True)]
    colour, dash, symbol = _style(record, unit)
    plot.add_scatter(
        x=mean["layer"].values,
        y=mean.values,
        name=unit,
        mode="lines+markers",
        line={"color": colour, "width": 2.2, "dash": dash},
        marker={"symbol": symbol, "size": 6},
        customdata=np.asarray([shares, ranges, [number(v) for v in p]]).T,
        hovertemplate=f"{unit}, layer %{{x}}<br>mean effect %{{y:.3g}}<br>share %{{customdata[0]}}<br>"
        "95 % interval %{customdata[1]}<br>p %{customdata[2]}<extra></extra>",
        **_look(record, unit),
    )


def ends(record: Record, outcome: str) -> Figure:
    """Outcomes of base and source by pair: dumbbells, or a scatter above `MOST_DUMBBELLS` pairs; coloured by category."""
    base, source = totals(record, outcome)
    known = np.flatnonzero(np.isfinite(base) & np.isfinite(source))
    categories = np.asarray([name or "(no category)" for name in labels(record, "category")])
    categories = np.where(labels(record, "control") == "", categories, np.char.add(categories.astype(str), " (control)"))
    names = record.table["pair"].values
    order = sorted(known, key=lambda i: (categories[i], source[i] - base[i]))
    few = len(order) <= MOST_DUMBBELLS
    size = 19 * len(order) + 110 if few else 520
    plot = canvas(max(size, 200), outcome if few else f"base {outcome}", "" if few else f"source {outcome}")
    plot.update_layout(modebar={"orientation": "v"}, margin={"r": 44})  # beside the plot, not over a legend of many categories
    for at, category in enumerate(dict.fromkeys(categories[i] for i in order)):
        rows = [i for i in order if categories[i] == category]
        colour = CATEGORICAL[at % len(CATEGORICAL)]
        draw = _dumbbells if few else _dots
        draw(plot, category, colour, [label(names[i]) for i in rows], base[rows], source[rows])
    both = np.concatenate([base[known], source[known]])
    if few:
        plot.add_vline(x=0, line={"color": "#9aa5b1", "width": 1, "dash": "dot"})
        plot.update_yaxes(type="category", autorange="reversed", showgrid=True, dtick=1, ticks="")
    else:
        span = [float(both.min()), float(both.max())]
        plot.add_scatter(x=span, y=span, mode="lines", line={"color": "#9aa5b1", "dash": "dot"}, showlegend=False, hoverinfo="skip")
    how = "Open: base. Filled: source. The bar between them is the total." if few else "A pair's height above the dotted line is its total."
    return Figure("Outcomes of base and source", f"{how} Mean total {number(mean_total(record, outcome))}. Coloured by category.", plot)


def _dumbbells(plot: go.Figure, category: str, colour: str, names: list[str], base: np.ndarray, source: np.ndarray) -> None:
    x = [v for a, b in zip(base.tolist(), source.tolist(), strict=True) for v in (a, b, None)]
    y = [v for name in names for v in (name, name, None)]
    text = [f"base {number(a)}<br>source {number(b)}<br>total {number(b - a)}" for a, b in zip(base, source, strict=True)]
    shared: dict[str, Any] = {"legendgroup": category, "customdata": text, "hovertemplate": "%{y}<br>%{customdata}<extra></extra>"}
    plot.add_scatter(x=x, y=y, mode="lines", line={"color": colour, "width": 2}, legendgroup=category, showlegend=False, hoverinfo="skip")
    hollow = {"symbol": "circle", "size": 9, "color": "#fff", "line": {"width": 2, "color": colour}}
    plot.add_scatter(x=base, y=names, mode="markers", marker=hollow, showlegend=False, **shared)
    plot.add_scatter(
        x=source, y=names, mode="markers", marker={"size": 10, "color": colour}, name=label(category), showlegend=True, **shared
    )


def _dots(plot: go.Figure, category: str, colour: str, names: list[str], base: np.ndarray, source: np.ndarray) -> None:
    text = [f"{name}<br>total {number(b - a)}" for name, a, b in zip(names, base, source, strict=True)]
    plot.add_scatter(
        x=base,
        y=source,
        mode="markers",
        marker={"size": 8, "color": colour, "opacity": 0.8},
        name=label(category),
        showlegend=True,
        customdata=text,
        hovertemplate="%{customdata}<br>base %{x:.3g}<br>source %{y:.3g}<extra></extra>",
    )
