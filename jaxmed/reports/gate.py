"""The page of a study of a gate, from its saved tables alone: verdicts first, then the figures they rest on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import plotly.graph_objects as go

from jaxmed.errors import UserError
from jaxmed.files import check_file, read_csv, write_text
from jaxmed.reports.figures import figures
from jaxmed.reports.html import page_of
from jaxmed.reports.packed import embedded
from jaxmed.reports.record import read
from jaxmed.reports.style import CATEGORICAL, INK, canvas, label, number
from jaxmed.runs.folder import last_versions, read_run, seconds_spent

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
WINDOWS = "Root mean square of the effects of windows of neurons: adjacent ones (line), and windows of shuffled orders (bars)."


def write_gate(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a study's folder (default: its report.html), and returns its path. The file works offline.

    Raises:
        UserError: a folder without a finished study.
    """
    out = out or folder / "report.html"
    check_file(out)
    run = read_run(folder)
    manifest = run.get("manifest", {})
    if "gate" not in manifest or not (folder / "verdicts.csv").is_file():
        raise UserError(f"{folder} holds no finished study of a gate. Give the --out folder of `jaxmed gate`; --resume finishes it.")
    rows, verdicts = read_csv(folder / "gate.csv"), read_csv(folder / "verdicts.csv")
    drawn = [
        ("How many neurons are enough", SUFFICIENT, _draw_sufficient(rows)),
        ("Is it a gate", GATED, _draw_index(rows)),
        *((f"Windows of {width} neurons", WINDOWS, _draw_windows(rows, width)) for width in _widths(rows)),
    ]
    outcome = manifest["gate"]["outcome"]
    drawn += [(one.title, one.caption, one.plot) for one in figures(read(folder / "modules"), outcome, 1)]
    parts = [{"id": f"part-{at}", "title": t, "caption": c, "data": embedded(plot)} for at, (t, c, plot) in enumerate(drawn)]
    layout, request = manifest["layout"], manifest["gate"]
    page = page_of(
        "gate.html.j2",
        title=f"Gate: neurons of layer {layout['layer']} of {manifest['model']['name']}",
        lead=LEAD,
        facts=[
            ("Model", manifest["model"]["name"]),
            ("Pairs", f"{len(manifest['pairs'])}"),
            ("Outcome", outcome),
            ("Position", str(request["position"])),
            ("Control layer", str(layout["control"])),
            ("Time", f"{seconds_spent(run):,.0f} s"),
        ],
        verdicts=[{**row, "numbers": numbers(row)} for row in verdicts],
        parts=parts,
        columns=list(rows[0]),
        rows=[[row[name] if name in ("role", "by", "k", "draw", "pairs") else number(row[name]) for name in row] for row in rows],
        manifest=json.dumps({key: manifest[key] for key in ("gate", "layout", "model", "pairs")}, indent=2, ensure_ascii=False),
        versions=", ".join(f"{name} {version}" for name, version in last_versions(run).items()),
        redraw=f"jaxmed report {shlex.quote(str(folder))}",
    )
    write_text(out, page)
    return out


def numbers(row: dict[str, str]) -> str:
    """The estimate of a verdict with its interval or p, as far as there are some."""
    found = row["estimate"] if row["estimate"].isdigit() else number(row["estimate"])
    found += f" ({number(row['low'])} to {number(row['high'])})" if row["low"] not in ("", "nan") else ""
    return found + (f", p = {number(row['p'])}" if row["p"] not in ("", "nan") else "")


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
