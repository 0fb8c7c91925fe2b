"""The tables of a run: the curve, its areas, the marked circuit's edges, and scores in the benchmark's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed import statistics
from jaxmed.circuits.curve import FRACTIONS, areas, faithfulness
from jaxmed.circuits.formats import Scored, read_scores, write_scores
from jaxmed.circuits.graph import connected
from jaxmed.circuits.job import CircuitJob
from jaxmed.circuits.listed import ALL, MARKED, NONE, Circuit, Found
from jaxmed.files import read_csv, write_csv

CURVE, MEASURES, EDGES = "curve.csv", "circuits.csv", "edges.csv"
CURVE_COLUMNS = ("method", "rank", "draw", "fraction", "count", "connected", "outcome", "faithfulness", "low", "high")
MEASURE_COLUMNS = ("method", "rank", "draw", "cpr", "cmd", "average", *CURVE_COLUMNS[4:])
EDGE_COLUMNS = ("method", "place", "edge", "score", "supports")
TEXTS = ("method", "rank", "edge", "supports")


def scores_file(method: str) -> str:
    """The name of a method's file of scores."""
    return f"scores-{method}.json"


def write_tables(job: CircuitJob, found: Found, circuits: Sequence[Circuit], outcomes: np.ndarray, out: Path) -> None:
    """Writes all tables; outcomes float [circuit, pair] of the pairs that are measured."""
    rows = [_row(job, circuit, outcomes[at], outcomes[0], outcomes[1]) for at, circuit in enumerate(circuits)]
    write_csv(out / CURVE, [row for row in rows if row["fraction"] != ""], CURVE_COLUMNS)
    write_csv(out / MEASURES, _measures(rows), MEASURE_COLUMNS)
    marked = {one.method: one.chosen for one in circuits if one.rank == MARKED and np.isnan(one.fraction)}
    write_csv(out / EDGES, [row for method, chosen in marked.items() for row in _edges(job, found, method, chosen)], EDGE_COLUMNS)
    for method, chosen in marked.items():
        scored = Scored(job.graph, found.sign * found.edges[method], found.sign * found.nodes[method], chosen)
        if np.isfinite(scored.edges[job.graph.real]).all():
            write_scores(out / scores_file(method), scored)


def _row(job: CircuitJob, circuit: Circuit, outcome: np.ndarray, every: np.ndarray, none: np.ndarray) -> dict[str, Any]:
    groups = np.asarray([job.pairs[pair].group for pair in job.measured])
    above, below = (statistics.group_means((one - none)[:, None].astype(np.float64), groups)[0][:, 0] for one in (outcome, every))
    _, low, high = statistics.ratio_interval(above, below)
    kept = int(connected(job.graph, circuit.chosen).sum())
    values = (circuit.method, circuit.rank, circuit.draw, circuit.fraction, circuit.count, kept)
    numbers = (float(outcome.mean()), faithfulness(outcome, every, none), low, high)
    blank = lambda value: "" if isinstance(value, float) and not np.isfinite(value) else value  # noqa: E731
    return {name: blank(value) for name, value in zip(CURVE_COLUMNS, (*values, *numbers), strict=True)}


def _measures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per curve: its areas, and its circuit of the marked size."""
    curves: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] not in (ALL, NONE):
            curves.setdefault((row["method"], row["rank"], row["draw"]), []).append(row)
    made = []
    for key, own in curves.items():
        line = [row["faithfulness"] for row in own if row["fraction"] != ""]
        whole = areas(np.asarray([*line, 1.0])) if len(line) == len(FRACTIONS) - 1 and "" not in line else None
        numbers = {} if whole is None else {"cpr": whole.cpr, "cmd": whole.cmd, "average": whole.average}
        marked = next((row for row in own if row["fraction"] == ""), {})
        made.append(
            {**dict(zip(("method", "rank", "draw"), key, strict=True)), **numbers, **{k: marked.get(k, "") for k in CURVE_COLUMNS[4:]}}
        )
    return made


def _edges(job: CircuitJob, found: Found, method: str, chosen: np.ndarray) -> list[dict[str, Any]]:
    """Edges of a circuit by |score|; without scores, in the graph's order."""
    at = tuple(job.graph.places.T)
    inside, scores = chosen[at], found.edges[method][at]
    order = [place for place in np.argsort(-np.abs(np.nan_to_num(scores)), kind="stable").tolist() if inside[place]]
    side = lambda score: "" if not score or np.isnan(score) else "base" if found.sign * score > 0 else "source"  # noqa: E731
    return [
        {"method": method, "place": number, "edge": job.graph.edges[place], "score": float(scores[place]), "supports": side(scores[place])}
        for number, place in enumerate(order, 1)
    ]


def as_dataset(job: CircuitJob, out: Path) -> xr.Dataset:
    """Scores, marked circuits and curves as one dataset, from the tables."""
    graph, rows, measures = job.graph, read_csv(out / CURVE, TEXTS), read_csv(out / MEASURES, TEXTS)
    files = {method: read_scores(out / scores_file(method)) for method in job.methods if (out / scores_file(method)).exists()}
    ends = {row["method"]: row["outcome"] for row in rows if row["method"] in (ALL, NONE)}
    sign = -1.0 if ends[NONE] < ends[ALL] else 1.0
    names = [" ".join(str(part) for part in _key(row) if part) for row in measures]
    kept = ("outcome", "faithfulness")
    lines = {name: np.full((len(names), len(FRACTIONS)), np.nan) for name in kept}
    for at, measure in enumerate(measures):
        own = {row["fraction"]: row for row in rows if _key(row) == _key(measure) or row["method"] == ALL}
        for place, fraction in enumerate(FRACTIONS):
            for name in kept:
                value = own.get(fraction, {}).get(name, "")
                lines[name][at, place] = np.nan if value == "" else value
    curves: dict[str, Any] = {name: (("curve", "fraction"), values) for name, values in lines.items()}
    curves |= {name: ("curve", [np.nan if row[name] == "" else row[name] for row in measures]) for name in ("cpr", "cmd", "average")}
    edges = {"score": [np.where(graph.real, sign * one.edges, np.nan) for one in files.values()]}
    edges |= {"in_circuit": [one.chosen for one in files.values()]}
    if files:
        curves |= {name: (("scored_by", "sender", "receiver"), np.stack(values)) for name, values in edges.items()}
        curves["node_score"] = (("scored_by", "sender"), np.stack([sign * one.nodes for one in files.values()]))
    coordinates = {"curve": names, "fraction": list(FRACTIONS), "scored_by": list(files)}
    coordinates |= {"sender": list(graph.senders), "receiver": list(graph.receivers)}
    more = {"curve_by": "method", "rank": "rank", "draw": "draw"}
    coordinates |= {name: ("curve", [row[key] for row in measures]) for name, key in more.items()}
    attributes = {"outcome_base": ends[ALL], "outcome_source": ends[NONE], "edges": len(graph.places)}
    return xr.Dataset(curves, coordinates, attributes)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["rank"], row["draw"]
