"""The page of circuits, from their saved tables alone: the curve beside random circuits, its areas, and the marked circuit's edges."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from jaxmed.errors import UserError
from jaxmed.files import check_file, read_csv, write_text
from jaxmed.reports.html import page_of
from jaxmed.reports.packed import embedded
from jaxmed.reports.style import CATEGORICAL, canvas, label, number
from jaxmed.runs.folder import last_versions, read_run, time_of

Rows = list[dict[str, str]]
CURVE, MEASURES, EDGES = "curve.csv", "circuits.csv", "edges.csv"
LEAD = (
    "Edges between heads, MLPs, the embedding and the logits are scored by gradients. Circuits of the best ones are then run exactly: "
    "base's prompt, with every edge outside the circuit carrying source's value. Faithfulness is (outcome of the circuit - outcome without "
    "any edge) / (outcome with all edges - outcome without any): 1 is what base does, 0 what source does."
)
FAITHFULNESS = (
    "Faithfulness by the part of all edges (or nodes) that the circuit keeps. Signed: edges that support base's behaviour first. Absolute: "
    "those for and against it alike. Random: as many, any of them (every draw a line). Rewired: as many edges into every input as the "
    "first method's absolute circuit has, from any nodes before it. Bars: 95 % intervals over groups."
)
AREAS = (
    "CPR, the area under faithfulness (0.999 for a circuit that is always faithful; more where circuits exceed base), and CMD, the area "
    "between faithfulness and 1 (0 at best), over the fraction of edges, as the Mechanistic Interpretability Benchmark defines them."
)
LARGEST = "The marked circuit's edges by |score|; positive where source's value raises the outcome, blue where the edge supports base."
NOTES = (
    "Scores are first-order estimates, faithfulness is exact. An edge whose effect needs another edge (a key that only matters with its "
    "query) can score near zero: a circuit of the highest scores may then miss what it needs.",
    "Where edges are scored and circuits run on the same pairs, the curve is optimistic: --apart keeps them apart.",
    "Edges that lie on no way from input to logits change nothing; `connected` counts those that do.",
)
CONTROLS = {"random": "#9aa5b1", "rewired": "#c9a66b"}
"""Kinds of random circuits, and their colours."""
MOST = 40
"""Edges that are drawn."""


def write_circuit(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a folder of circuits (default: its report.html), and returns its path. The file works offline.

    Raises:
        UserError: a folder without a finished run.
    """
    out = out or folder / "report.html"
    check_file(out)
    run = read_run(folder)
    manifest = run.get("manifest", {})
    if "circuit" not in manifest or not (folder / MEASURES).is_file():
        raise UserError(f"{folder} holds no finished circuits. Give the --out folder of `jaxmed circuit`; --resume finishes it.")
    curve, measures, edges = (read_csv(folder / name) for name in (CURVE, MEASURES, EDGES))
    parts = [_part(0, "Faithfulness", FAITHFULNESS, draw_curve(curve), CURVE, curve)]
    parts.append(_part(1, "Areas", AREAS, _draw_areas(measures), MEASURES, measures))
    parts += [_part(2, "The marked circuit", LARGEST, _draw_edges(edges), EDGES, edges)] if edges else []
    page = page_of(
        "study.html.j2",
        title=f"Circuits of {manifest['model']['name']}",
        lead=LEAD,
        facts=_facts(run, curve),
        notes=NOTES,
        parts=parts,
        manifest=json.dumps({key: value for key, value in manifest.items() if key != "tokens"}, indent=2, ensure_ascii=False),
        versions=", ".join(f"{name} {version}" for name, version in last_versions(run).items()),
        redraw=f"jaxmed report {shlex.quote(str(folder))}",
    )
    write_text(out, page)
    return out


def _facts(run: dict[str, Any], curve: Rows) -> list[tuple[str, str]]:
    manifest = run["manifest"]
    spec, ends = manifest["circuit"], {row["method"]: row for row in curve}
    every, none = ends["all edges"], ends["no edges"]
    return [
        ("Model", manifest["model"]["name"]),
        ("Outcome", spec["outcome"]),
        ("Pairs", str(len(manifest["pairs"])) + (", scored and run apart" if spec["apart"] else "")),
        ("Circuits of", f"nodes ({every['count']})" if spec["nodes"] else f"edges ({int(every['count']):,})"),
        ("Outcome in base", number(every["outcome"])),
        ("Outcome in source", number(none["outcome"])),
        ("All and no edges against ordinary runs", f"within {number(run.get('identity'))}"),
        ("Time", time_of(run)),
    ]


def draw_curve(rows: Rows) -> go.Figure:
    """Faithfulness over the fraction of edges, a line per method and rank."""
    figure = canvas(460, "fraction of edges kept", "faithfulness")
    whole = [row for row in rows if row["method"] == "all edges"]
    lines: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        if row["method"] not in ("all edges", "no edges"):
            lines.setdefault((row["method"], row["rank"], row["draw"]), []).append(row)
    colours = iter(CATEGORICAL)
    for (method, rank, draw), own in lines.items():
        chance = method in CONTROLS
        own = [row for row in own + whole if row["faithfulness"]]
        at = [float(row["faithfulness"]) for row in own]
        ends = [[abs(float(row[end]) - value) if row[end] else 0.0 for row, value in zip(own, at, strict=True)] for end in ("high", "low")]
        look = {"color": CONTROLS[method], "width": 1} if chance else {"color": next(colours), "width": 2}
        bars = None if chance else {"type": "data", "array": ends[0], "arrayminus": ends[1], "thickness": 1}
        name = method if chance else label(f"{method}, {rank}")
        shown = {"legendgroup": name, "showlegend": not chance or draw == "1", "mode": "lines+markers"}
        x = [float(row["fraction"]) for row in own]
        figure.add_trace(go.Scatter(x=x, y=at, name=name, line=look, error_y=bars, **shown))
    figure.update_xaxes(type="log", exponentformat="power")
    figure.add_hline(y=1.0, line={"color": "#1f2933", "width": 1, "dash": "dot"})
    return figure


def _draw_areas(rows: Rows) -> go.Figure:
    figure = canvas(320, "", "area")
    known = [row for row in rows if row["cpr"]]
    names = [label(" ".join(filter(None, (row["method"], row["rank"], row["draw"] if row["method"] in CONTROLS else "")))) for row in known]
    for at, (column, title) in enumerate((("cpr", "CPR"), ("cmd", "CMD"))):
        figure.add_trace(go.Bar(x=names, y=[float(row[column]) for row in known], name=title, marker={"color": CATEGORICAL[at]}))
    figure.update_layout(barmode="group")
    return figure


def _draw_edges(rows: Rows) -> go.Figure:
    """The largest edges of the first method."""
    own = [row for row in rows if row["method"] == rows[0]["method"] and row["score"] not in ("", "nan")][:MOST]
    figure = canvas(120 + 20 * len(own), "score, in units of the outcome", "")
    colours = [CATEGORICAL[row["supports"] != "base"] for row in own]
    bars = go.Bar(y=[label(row["edge"]) for row in own], x=[float(row["score"]) for row in own], orientation="h", marker={"color": colours})
    figure.add_trace(bars)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def _part(at: int, title: str, caption: str, plot: go.Figure, file: str, rows: Rows) -> dict[str, Any]:
    columns = list(rows[0])
    texts = [place for place, name in enumerate(columns) if name in ("method", "rank", "edge", "supports")]
    whole = {"draw", "count", "connected", "place", *(columns[place] for place in texts)}
    cells = [[row[name] if name in whole or not row[name] else number(row[name]) for name in columns] for row in rows]
    shown = {"title": title, "caption": caption, "data": embedded(plot), "file": file, "columns": columns, "texts": texts, "rows": cells}
    return {"id": f"part-{at}", **shown}
