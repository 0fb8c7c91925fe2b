"""Heat maps: layer by unit, layer by head, layer by position."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from jaxmed.reports.record import Record, index_axis, mean_effect, shared_total, statistic, swept, used_pairs
from jaxmed.reports.style import DIVERGING, EMPTY, SEQUENTIAL, Figure, canvas, label, number, percent

DOTS = 20


def limit(values: np.ndarray) -> float:
    """Colour limit: the 99.9th percentile of |values|; 1 where all are 0."""
    sizes = np.abs(values[np.isfinite(values)])
    return (float(np.percentile(sizes, 99.9)) or float(sizes.max()) or 1.0) if sizes.size else 1.0


def heat(
    values: np.ndarray,
    layers: np.ndarray,
    x: Any,
    axis: str,
    hover: str,
    title: str,
    extra: np.ndarray | None = None,
    named: Sequence[str] = (),
) -> go.Figure:
    """A heat map of values [layer, x]: diverging and centred at 0, or sequential where nothing is negative and `title` sums |effects|.

    Args:
        named: texts of the columns.
    """
    top, signed = limit(values), not title.startswith("Σ")
    plot = canvas(int(np.clip(17 * len(layers), 110, 560)) + 84, axis, "layer")
    names = [str(layer) for layer in layers]
    plot.add_heatmap(
        z=values.astype(np.float32),
        x=x,
        y=names,
        customdata=extra,
        hovertemplate=hover + "<extra></extra>",
        hoverongaps=False,
        zmin=-top if signed else 0,
        zmax=top,
        colorscale=DIVERGING if signed else SEQUENTIAL,
        colorbar={"title": {"text": title, "side": "right"}, "thickness": 14, "outlinewidth": 0, "len": 1.0, "exponentformat": "power"},
    )
    plot.update_layout(plot_bgcolor=EMPTY, margin={"r": 10, "t": 32})
    step = x[1] - x[0] if len(x) > 1 else 1
    plot.update_xaxes(showgrid=False, range=[x[0] - step / 2, x[-1] + step / 2])
    if named:
        plot.update_xaxes(
            tickmode="array", tickvals=list(x), ticktext=[escape(name) for name in named], tickangle=-60 if len(named) > 8 else 0
        )
    order = {"type": "category", "categoryorder": "array", "categoryarray": names}
    plot.update_yaxes(showgrid=False, nticks=20, range=[-0.5, len(names) - 0.5], **order)
    return plot


def binned(values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Adjacent units binned into at most `columns`: of each bin the value with the largest size.

    Args:
        values: float [L, U].

    Returns:
        values [L, bins], the unit that each shows, int [L, bins], and units per bin.
    """
    rows, units = values.shape
    width = -(-units // columns)
    bins = -(-units // width)
    padded = np.full((rows, bins * width), np.nan)
    padded[:, :units] = values
    stacked = padded.reshape(rows, bins, width)
    best = np.argmax(np.nan_to_num(np.abs(stacked), nan=-1.0), axis=2)
    return np.take_along_axis(stacked, best[..., None], 2)[..., 0], np.arange(bins) * width + best, width


def unit_map(record: Record, unit: str, outcome: str, columns: int) -> Figure:
    """Layer by neuron (or window): the mean effect, the largest dotted; above `columns` units, neighbours are binned."""
    mean = swept(mean_effect(record, unit, outcome)).transpose("layer", index_axis(record, unit))
    layers = mean["layer"].values
    shown, index, width = binned(mean.values, columns)
    hover = f"layer %{{y}}<br>{unit} %{{customdata}}<br>mean effect %{{z:.3g}}"
    plot = heat(
        shown,
        layers,
        np.arange(shown.shape[1]) * width,
        f"{unit} index",
        hover,
        "mean effect",
        index.astype(np.uint16 if index.max(initial=0) < 2**16 else np.uint32),
    )
    sizes = np.nan_to_num(np.abs(shown))
    largest = np.argsort(-sizes, axis=None, kind="stable")[: min(DOTS, int((sizes > 0).sum()))]
    rows, cols = np.unravel_index(largest, shown.shape)
    notes = _notes(record, unit, outcome, [(int(layers[r]), int(index[r, c])) for r, c in zip(rows, cols, strict=True)], shown[rows, cols])
    look = {"size": 8, "color": shown[rows, cols], "colorscale": DIVERGING, "cmin": -limit(shown), "cmax": limit(shown)}
    plot.add_scatter(
        x=cols * width,
        y=[str(layer) for layer in layers[rows]],
        mode="markers",
        showlegend=False,
        marker={**look, "line": {"width": 1, "color": "#111"}},
        hovertext=notes,
        hoverinfo="text",
    )
    window = record.table[unit].attrs.get("window")
    noun = unit if index_axis(record, unit) == f"{unit}_index" else f"neuron's {unit} branch"
    what = f"Windows of {window} adjacent neurons. " if window else ""
    if width > 1:
        what += f"Each column holds {width} neighbours and shows the one with the largest |mean effect| (hover names it). "
    caption = (
        f"{what}Mean effect on {outcome} over pairs; red is toward the target, blue toward the foil. Colours saturate at "
        f"±{number(limit(shown))}, the 99.9th percentile of |mean effect|; dots mark the {len(largest)} largest. "
        "Where columns are narrower than a pixel, neighbours hide each other: drag to zoom in."
    )
    return Figure(f"Effect of every {noun}", caption, plot)


def _notes(record: Record, unit: str, outcome: str, places: list[tuple[int, int]], means: np.ndarray) -> list[str]:
    """What hovering over single units says: effect, interval, and the tokens that a neuron promotes, as far as they are known."""
    bounds = [statistic(record, unit, outcome, name) for name in ("ci_low", "ci_high")]
    rows = [row for row in record.top or [] if (row["unit"], row["outcome"], row.get("category", "")) == (unit, outcome, "")]
    promoted = {(row["layer"], row["index"]): row.get("promotes", "") for row in rows}
    notes = []
    for (layer, index), mean in zip(places, means, strict=True):
        note = f"layer {layer}<br>{unit} {index}<br>mean effect {number(float(mean))}"
        if all(bound is not None for bound in bounds):
            at = {"layer": layer, index_axis(record, unit): index}
            low, high = (float(bound.sel(at)) for bound in bounds if bound is not None)
            note += f"<br>95 %: {number(low)} to {number(high)}" if np.isfinite([low, high]).all() else ""
        words = promoted.get((str(layer), str(index)))
        notes.append(note + (f"<br>promotes {label(words)}" if words else ""))
    return notes


def head_map(record: Record, unit: str, outcome: str) -> Figure:
    """Layer by head: the mean effect, with share and both p on hover."""
    mean = swept(mean_effect(record, unit, outcome)).transpose("layer", "head_index")
    stored = [statistic(record, unit, outcome, field) for field in ("p", "p_adjusted")]
    total = shared_total(record, outcome)
    tests = [
        np.full(mean.shape, np.nan) if p is None else p.sel(layer=mean["layer"]).transpose("layer", "head_index").values for p in stored
    ]
    notes = [
        [[percent(v / total), number(p), number(adjusted)] for v, p, adjusted in zip(*row, strict=True)]
        for row in zip(mean.values, *tests, strict=True)
    ]
    hover = "layer %{y}<br>head %{x}<br>mean effect %{z:.3g}<br>share %{customdata[0]}<br>p %{customdata[1]}<br>p_adjusted %{customdata[2]}"
    plot = heat(mean.values, mean["layer"].values, mean["head_index"].values, "head", hover, "mean effect", np.asarray(notes))
    plot.update_xaxes(dtick=1 if mean.sizes["head_index"] <= 32 else None)
    caption = f"Mean effect on {outcome} of swapping one head's output; colours saturate at ±{number(limit(mean.values))}."
    return Figure("Effect of every attention head", caption, plot)


def position_map(record: Record, unit: str, outcome: str) -> Figure:
    """Layer by position: the mean effect of a module, or the sum of |mean effect| over the units of a layer."""
    mean = swept(mean_effect(record, unit, outcome))
    axis = index_axis(record, unit)
    values: xr.DataArray = abs(mean).sum(axis, min_count=1) if axis else mean
    values = values.transpose("layer", "position")
    title = "Σ |mean effect|" if axis else "mean effect"
    hover = f"layer %{{y}}<br>position %{{x}}<br>{title} %{{z:.3g}}"
    places, named = _places(record)
    axis_title = "token" if "token" in record.table.coords and named else "span" if named else "position, counted from the right"
    plot = heat(values.values, values["layer"].values, places, axis_title, hover, title, named=named)
    what = f"Sum over the {mean.sizes[axis]:,} units of a layer of |mean effect|" if axis else "Mean effect"
    where = "the tokens of one span together" if axis_title == "span" else "one position at a time; -1 is the last prompt token"
    caption = f"{what} on {outcome}, {where}. Grey: not every group of pairs has that position."
    return Figure(f"{label(unit)} by layer and position", caption, plot)


def _places(record: Record) -> tuple[np.ndarray, list[str]]:
    """Where positions are drawn, and their names: spans by theirs, tokens by their text where one pair is shown."""
    positions = record.table["position"].values
    if positions.dtype.kind not in "iuf":
        return np.arange(len(positions)), [str(name) for name in positions]
    pairs = used_pairs(record)
    if len(pairs) != 1 or "token" not in record.table.coords:
        return positions, []
    texts = record.table["token"].values[pairs[0]]
    return positions, [str(text).replace("\n", "⏎") or " " for text in texts]
