"""The page of a study of a gate, from its saved tables alone: verdicts first, then the figures they rest on."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from jaxmed.files import read_csv
from jaxmed.reports.figures import figures
from jaxmed.reports.record import read
from jaxmed.reports.style import CATEGORICAL, INK, Figure, canvas, label
from jaxmed.reports.verdicts import finished_run, write_verdicts

Rows = list[dict[str, str]]
LEAD = (
    "Neurons of one layer are ranked in one half of the pairs; the first k of them are then patched together in the other half, and the "
    "other way round. Every number is an exact joint effect on pairs that had no part in the choice, never a sum of single effects."
)
SUFFICIENT = (
    "What the first k neurons of each ranking do together, as a share of the effect of the layer's whole MLP. Random: as many, each drawn "
    "among those that change the residual stream by about as much. Rest: all neurons but the first k. Bars: 95 % intervals."
)
GATED = (
    "Gating index: 1 - (effect of an earlier module while the first k neurons are held at their base values) / (its effect). 1: all of it "
    "goes through them; 0: none does, and they merely add. Dashed: random neurons of like size are held. Bars: 95 % intervals."
)
CLAMPED = (
    "Scores of the answers to base and source prompts, as they are, and while the group (or random neurons of like size) keeps its mean "
    "values of the other run, at the prompt's last token and at every written one."
)
WINDOWS = "Root mean square of the effects of windows of neurons: adjacent ones (line), and windows of shuffled orders (bars)."


def write_gate(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a study's folder (default: its report.html), and returns its path. The file works offline.

    Raises:
        UserError: a folder without a finished study.
    """
    manifest = finished_run(folder, "gate", "gate")["manifest"]
    layout, request = manifest["layout"], manifest["gate"]
    facts = [("Outcome", request["outcome"]), ("Position", str(request["position"])), ("Control layer", str(layout["control"]))]
    drawn = gate_figures(folder) + figures(read(folder / "modules"), request["outcome"], 1)
    title = f"Gate: neurons of layer {layout['layer']} of {manifest['model']['name']}"
    shown = ("gate", "layout", "model", "source_model", "pairs")
    return write_verdicts(folder, out, title, LEAD, facts, drawn, [folder / "gate.csv"], shown)


def gate_figures(folder: Path) -> list[Figure]:
    """The figures of a study of a gate."""
    rows, answers = read_csv(folder / "gate.csv"), folder / "answers.csv"
    found = [Figure("How many neurons are enough", SUFFICIENT, _draw_sufficient(rows)), Figure("Is it a gate", GATED, _draw_index(rows))]
    found += [Figure(f"Windows of {width} neurons", WINDOWS, _draw_windows(rows, width)) for width in _widths(rows)]
    return [*found, Figure("Answers while the group is clamped", CLAMPED, _draw_answers(read_csv(answers)))] if answers.is_file() else found


def _draw_answers(rows: Rows) -> go.Figure:
    """Mean scores by condition."""
    figure = canvas(300, "prompts", "mean score (rules: share of refusals)")
    names = {"none": "as they are", "top": "group clamped", "matched": "random neurons clamped"}
    for at, condition in enumerate(dict.fromkeys((row["group"], row["values"]) for row in rows)):
        group, values = condition
        mine = [row for row in rows if (row["group"], row["values"]) == condition and row["score"]]
        prompts = list(dict.fromkeys(row["prompts"] for row in mine))
        scores = [[float(row["score"]) for row in mine if row["prompts"] == which] for which in prompts]
        name = names[group] + (f" at {values}'s values" if values else "")
        means = [sum(one) / len(one) for one in scores]
        figure.add_trace(go.Bar(x=prompts, y=means, name=name, marker={"color": CATEGORICAL[at]}))
    return figure


def _of(rows: Rows, role: str, by: str) -> Rows:
    return [row for row in rows if (row["role"], row["by"], row["pairs"]) == (role, by, "held out")]


def _curve(figure: go.Figure, rows: Rows, name: str, colour: str, dash: str = "solid", index: bool = False) -> None:
    """Shares by k with their bars; as gating indices, 1 minus that."""
    turn = (lambda x: 1 - x) if index else (lambda x: x)
    k, share = [int(row["k"]) for row in rows], [turn(float(row["share"])) for row in rows]
    ends = [sorted((turn(float(row["share_low"])), turn(float(row["share_high"])))) for row in rows]
    bars = {
        "type": "data",
        "symmetric": False,
        "thickness": 1,
        "array": [high - at for at, (_, high) in zip(share, ends, strict=True)],
        "arrayminus": [at - low for at, (low, _) in zip(share, ends, strict=True)],
    }
    line = {"color": colour, "dash": dash}
    figure.add_trace(go.Scatter(x=k, y=share, name=label(name), mode="lines+markers", line=line, error_y=bars))


def _draw_sufficient(rows: Rows) -> go.Figure:
    figure = canvas(460, "neurons patched together", "share of the whole MLP's effect")
    rankings = list(dict.fromkeys(row["by"] for row in rows if row["role"] == "top"))
    for number_of, ranking in enumerate(rankings):
        _curve(figure, _of(rows, "top", ranking), ranking, CATEGORICAL[number_of % len(CATEGORICAL)])
    for role, dash in (("matched", "dash"), ("other layer", "dot"), ("rest", "dashdot")):
        if found := _of(rows, role, "effect"):
            _curve(figure, found, "random, like size" if role == "matched" else role, INK, dash)
    figure.add_hline(y=1, line={"color": "#9aa5b1", "width": 1})
    return _by_size(figure, rows)


def _draw_index(rows: Rows) -> go.Figure:
    figure = canvas(420, "neurons held at base", "gating index")
    for at, module in enumerate(dict.fromkeys(row["by"] for row in rows if row["role"] == "upstream")):
        for role, dash in (("held", "solid"), ("held matched", "dash")):
            _curve(figure, _of(rows, role, module), module if role == "held" else f"{module}, random", CATEGORICAL[at], dash, index=True)
    return _by_size(figure, rows)


def _by_size(figure: go.Figure, rows: Rows) -> go.Figure:
    """Numbers of neurons on a logarithmic axis, the legend below it."""
    sizes = sorted({int(row["k"]) for row in rows if row["k"]})
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[str(size) for size in sizes])
    figure.update_layout(legend={"y": -0.2, "yanchor": "top"})
    return figure


def _widths(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["by"] for row in rows if row["role"] == "windows"))


def _draw_windows(rows: Rows, width: str) -> go.Figure:
    figure = canvas(300, "root mean square of window effects", "orders")
    figure.add_trace(go.Histogram(x=[float(row["mean"]) for row in _of(rows, "shuffled windows", width)], marker={"color": CATEGORICAL[5]}))
    (adjacent,) = _of(rows, "windows", width)
    figure.add_vline(x=float(adjacent["mean"]), line={"color": CATEGORICAL[1], "width": 3})
    return figure
