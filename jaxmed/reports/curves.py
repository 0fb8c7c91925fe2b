"""Curves from saved tables: the losses of fine-tuning, what pruning does by fraction of weights, and its transfer between behaviours."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from pathlib import Path

import plotly.graph_objects as go

from jaxmed.files import read_csv, write_text
from jaxmed.reports.html import page_of
from jaxmed.reports.packed import embedded
from jaxmed.reports.style import CATEGORICAL, DIVERGING, canvas, label


def write_loss_curve(table: Path, out: Path) -> Path:
    """Draws losses per step, and the held-out losses, as one HTML file that works offline; returns its path."""
    rows = read_csv(table)
    figure = canvas(420, "optimiser step", "loss, nats per response token")
    steps = [int(row["step"]) for row in rows]
    figure.add_trace(go.Scatter(x=steps, y=[float(row["loss"]) for row in rows], name="training batch", line={"color": CATEGORICAL[0]}))
    held = [row for row in rows if row["heldout_loss"]]
    if held:
        x, y = [int(row["step"]) for row in held], [float(row["heldout_loss"]) for row in held]
        figure.add_trace(go.Scatter(x=x, y=y, name="held out", mode="lines+markers", line={"color": CATEGORICAL[1]}))
    return _write(figure, out)


def _write(figure: go.Figure, out: Path) -> Path:
    write_text(out, page_of("figure.html.j2", title=out.stem, data=embedded(figure)))
    return out


DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


Rows = list[dict[str, str]]


def _tested(rows: Rows) -> list[str]:
    """The test sets of a table."""
    return [column.removesuffix("_rise") for column in rows[0] if column.endswith("_rise")]


def _bars(mean: list[float], low: list[float], high: list[float]) -> dict[str, object]:
    """95 % bars of plotly."""
    above, below = ([abs(edge - at) for edge, at in zip(edges, mean, strict=True)] for edges in (high, low))
    return {"type": "data", "symmetric": False, "thickness": 1, "array": above, "arrayminus": below}


def _numbers(rows: Rows, column: str) -> list[float]:
    return [float(row[column]) if row[column] else float("nan") for row in rows]


def write_pruning_curve(table: Path, out: Path) -> Path:
    """Draws `draw_pruning_curve` as one HTML file that works offline; returns its path."""
    return _write(draw_pruning_curve(read_csv(table)), out)


def draw_pruning_curve(rows: Rows) -> go.Figure:
    """What is left of the probability per token, exp(-rise), of every test set and of plain text (one over the perplexity's ratio),
    against the fraction q of chosen weights: a dash per rule, a colour per set; 95 % bars; the line at one half, where q50 is read."""
    rows = [row for row in rows if row["rule"] != "none"]
    figure = canvas(480, "fraction q of weights chosen per matrix", "probability per token over that of the unpruned model")
    qs = sorted({float(row["q"]) for row in rows})
    figure.update_xaxes(type="log", tickvals=qs, ticktext=[f"{q:g}" for q in qs])
    figure.update_yaxes(rangemode="tozero")
    figure.add_hline(y=0.5, line={"color": "#9aa5b1", "width": 1})
    for number, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        of_rule = [row for row in rows if row["rule"] == rule]
        at = sorted({float(row["q"]) for row in of_rule})
        groups = [[row for row in of_rule if float(row["q"]) == q] for q in at]
        for colour, (name, value, low, high) in enumerate(_left(rows)):
            left = [exp(-sum(value(row) for row in group) / len(group)) for group in groups]
            edges = ([exp(-edge(group[0])) for group in groups] for edge in (high, low))
            bars = _bars(left, *edges) if len(groups[0]) == 1 else None
            line = {"color": CATEGORICAL[colour % len(CATEGORICAL)], "dash": DASHES[number % len(DASHES)]}
            figure.add_trace(go.Scatter(x=at, y=left, name=f"{name}, {rule}", mode="lines+markers", line=line, error_y=bars))
    return figure


Rise = Callable[[dict[str, str]], float]


def _left(rows: Rows) -> list[tuple[str, Rise, Rise, Rise]]:
    """(name, rise of the loss in nats, its lower and its upper edge) of every test set, and of plain text where it was measured."""

    def of(column: str) -> Rise:
        return lambda row: float(row[column])

    def logarithm(column: str) -> Rise:
        return lambda row: log(float(row[column]))

    found = [(name, of(f"{name}_rise"), of(f"{name}_low"), of(f"{name}_high")) for name in _tested(rows)]
    if rows and rows[0].get("perplexity_ratio"):
        found.append(("plain text", logarithm("perplexity_ratio"), logarithm("perplexity_low"), logarithm("perplexity_high")))
    return found


def write_transfer(table: Path, out: Path) -> Path:
    """Draws `draw_transfer` as one HTML file that works offline; returns its path."""
    return _write(draw_transfer(read_csv(table)), out)


def draw_transfer(rows: Rows) -> go.Figure:
    """A matrix: pruned for (rows), tested on (columns), colour the rise of the loss; random masks averaged."""
    names, masks = _tested(rows), list(dict.fromkeys(row["mask"] for row in rows))
    groups = [[row for row in rows if row["mask"] == mask] for mask in masks]
    rises = [[sum(float(row[f"{name}_rise"]) for row in group) / len(group) for name in names] for group in groups]
    most = max(abs(value) for line in rises for value in line) or 1.0
    figure = canvas(160 + 40 * len(masks), "tested on", "pruned for")
    text = [[f"{value:+.3f}" for value in line] for line in rises]
    heat = go.Heatmap(z=rises, x=names, y=masks, text=text, texttemplate="%{text}", colorscale=DIVERGING, zmin=-most, zmax=most)
    figure.add_trace(heat)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def write_compression(table: Path, out: Path) -> Path:
    """Draws `draw_compression` as one HTML file that works offline; returns its path."""
    return _write(draw_compression(read_csv(table)), out)


def draw_compression(rows: Rows) -> go.Figure:
    """q50 of every behaviour, a colour per model, 95 % bars; open where it is beyond the utility limit; none where it is never reached."""
    figure = canvas(420, "behaviour", "q50: fraction q of chosen weights at which it is halved")
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_layout(scattermode="group")
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == model and float(row["q50"]) < float("inf")]
        at = _numbers(own, "q50")
        bars = _bars(at, _numbers(own, "q50_low"), _numbers(own, "q50_high"))
        harmless = [row["within_limit"] != "0" for row in own]
        look = {
            "color": CATEGORICAL[number % len(CATEGORICAL)],
            "size": 11,
            "symbol": ["circle" if one else "circle-open" for one in harmless],
        }
        names = [row["behaviour"] for row in own]
        figure.add_trace(go.Scatter(x=names, y=at, name=label(model), mode="markers", marker=look, error_y=bars))
    return figure


def write_dissociation(table: Path, out: Path) -> Path:
    """Draws `draw_dissociation` as one HTML file that works offline; returns its path."""
    return _write(draw_dissociation(read_csv(table)), out)


def draw_dissociation(rows: Rows) -> go.Figure:
    """Two panels over masks: the rise of losses, and detection (AUC) and refusal (rate); 95 % bars; random masks' first draw."""
    rows = [row for row in rows if float(row["seed"]) == 0]
    losses = [(f"{name}: loss", f"{name}_rise", f"{name}_low", f"{name}_high") for name in _tested(rows)]
    rates = [("detect: AUC", "detect_auc", "detect_auc_low", "detect_auc_high"), ("refuse: rate", "refuse", "refuse_low", "refuse_high")]
    return _two_panels(rows, [row["mask"] for row in rows], losses, [one for one in rates if one[1] in rows[0]])


def write_attacks(table: Path, out: Path) -> Path:
    """Draws `draw_attacks` as one HTML file that works offline; returns its path."""
    return _write(draw_attacks(read_csv(table)), out)


def draw_attacks(rows: Rows) -> go.Figure:
    """Two panels over masks and attacks: the rise of the behaviour's loss, and the refusal rate; 95 % bars."""
    losses = [(f"{name}: loss", f"{name}_rise", f"{name}_low", f"{name}_high") for name in _tested(rows)]
    rates = [("refuse: rate", "refuse", "refuse_low", "refuse_high")] if "refuse" in rows[0] else []
    return _two_panels(rows, [f"{row['mask']}<br>{row['attack']}" for row in rows], losses, rates)


def _two_panels(rows: Rows, names: list[str], losses: list[tuple[str, str, str, str]], rates: list[tuple[str, str, str, str]]) -> go.Figure:
    """Grouped bars: losses above, rates from 0 to 1 below."""
    figure = canvas(560 if rates else 380, "", "rise of the loss, nats per token")
    for number, (title, value, low, high) in enumerate([*losses, *rates]):
        at = _numbers(rows, value)
        look = {"marker_color": CATEGORICAL[number % len(CATEGORICAL)], "yaxis": "y2" if number >= len(losses) else "y"}
        figure.add_trace(go.Bar(x=names, y=at, name=title, error_y=_bars(at, _numbers(rows, low), _numbers(rows, high)), **look))
    if rates:
        style = figure["layout"]["yaxis"].to_plotly_json() | {"title": {"text": "AUC, rate"}, "domain": [0, 0.42], "range": [0, 1]}
        figure.update_layout(yaxis={"domain": [0.52, 1]}, yaxis2=style | {"anchor": "x"}, xaxis={"anchor": "y2"})
    figure.update_layout(barmode="group")
    return figure
