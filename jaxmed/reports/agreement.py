"""How well estimates agree with exact effects of the same pairs, from two saved runs alone: tables and a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from scipy.stats import rankdata

from jaxmed.errors import UserError
from jaxmed.files import write_csv, write_text
from jaxmed.reports.html import page_of
from jaxmed.reports.packed import embedded
from jaxmed.reports.record import Record, index_axis, labels, select
from jaxmed.reports.style import CATEGORICAL, canvas, number
from jaxmed.runs.folder import last_versions
from jaxmed.statistics import mean_interval

AGREEMENT, MISSES, PAGE = "agreement.csv", "misses.csv", "agreement.html"
TOP = (10, 100, 1000)
MOST_MISSES, MOST_POINTS = 50, 1500
LEAD = (
    "Every number compares an estimate with the exact effect of the same unit of the same pair. Correlations and recall are taken within "
    "each pair and then averaged; intervals are 95 % intervals of that mean over groups of pairs, where there are ten or more."
)
MISSED = (
    "The largest differences of each kind. overshoot: the estimate is more than twice the effect, so the outcome bends back on the way "
    "(saturation, or a norm that grows with the change). undershoot: it is less than half, so the slope is small at the base run and "
    "grows. opposite: it has the other sign (effects of opposite sign that cancel at the base run)."
)
SAME = ("pairs", "tokens", "answers")
"""Entries of the manifest that both runs must share."""


def check_runs(exact: Record, estimate: Record) -> list[str]:
    """The kinds of units that two runs can be compared on.

    Raises:
        UserError: the first is no exact sweep or the second no estimate; other pairs, model, or request; no kind of unit in common.
    """
    if not exact.exact or estimate.exact:
        raise UserError(
            f"--exact is the folder of a sweep with --method exact, and --estimate of one with another. They are {exact.values} "
            f"and {estimate.values}."
        )
    for name in SAME:
        if exact.manifest.get(name) != estimate.manifest.get(name):
            raise UserError(
                f"The runs have different {name}, so their effects are not of the same things. Sweep the same pairs with both methods."
            )
    if exact.manifest.get("model", {}).get("weights") != estimate.manifest.get("model", {}).get("weights"):
        raise UserError("The runs are of different weights. Sweep the same model with both methods.")
    if exact.manifest.get("source_model", {}).get("weights") != estimate.manifest.get("source_model", {}).get("weights"):
        raise UserError("The runs take their values from different source models. Sweep with the same --source-model and both methods.")
    drawn = ("seed",) if exact.request.get("patch") == "noise" else ()
    for name in ("outcomes", "position", "patch", "patch_factor", "contrast", "direction", "window", "form", *drawn):
        if (one := exact.request.get(name)) != (other := estimate.request.get(name)):
            raise UserError(f"The runs differ in {name}: {one} and {other}. Sweep with the same flags and both methods.")
    units = [unit for unit in exact.units if unit in estimate.units]
    if not units:
        raise UserError(f"No kind of unit is in both runs: {', '.join(exact.units)}; {', '.join(estimate.units)}.")
    return units


def _both(exact: Record, estimate: Record, unit: str, outcome: str) -> tuple[xr.DataArray, xr.DataArray]:
    """The two runs' values of a kind, at what both have computed."""
    return tuple(xr.align(*(select(one.table[unit], outcome).transpose("pair", ...) for one in (exact, estimate)), join="inner"))  # type: ignore[return-value]


def _parts(effects: xr.DataArray) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(layer, position, selection): all together, every layer, every position."""
    yield "all", "all", {}
    for layer in effects["layer"].values.tolist():
        yield str(layer), "all", {"layer": layer}
    for position in effects["position"].values.tolist() if "position" in effects.dims else ():
        yield "all", str(position), {"position": position}


def agreement_rows(exact: Record, estimate: Record, unit: str, outcome: str) -> list[dict[str, Any]]:
    """Rows of agreement.csv of one kind of unit and outcome."""
    both, groups, rows = _both(exact, estimate, unit, outcome), labels(exact, "group"), []
    for layer, position, at in _parts(both[0]):
        x, y = (np.asarray(one.sel(at).values).reshape(one.sizes["pair"], -1) for one in (both[1], both[0]))
        known = np.isfinite(x) & np.isfinite(y)
        pairs = np.flatnonzero(known.sum(1) > 1)
        if not len(pairs):
            continue
        found = [_measures(x[pair][known[pair]], y[pair][known[pair]]) for pair in pairs]
        row: dict[str, Any] = {"unit": unit, "outcome": outcome, "layer": layer, "position": position, "pairs": len(pairs)}
        row["units"] = int(known[pairs].sum(1).max())
        for name in found[0]:
            values = np.asarray([one.get(name, np.nan) for one in found])
            means = np.asarray([values[groups[pairs] == group].mean() for group in dict.fromkeys(groups[pairs])])
            low, high = mean_interval(means, legal=(-1.0, 1.0) if name in ("spearman", "pearson") else (0.0, 1.0))
            row |= {name: float(means.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row)
    return rows


def _measures(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Agreement of estimates x with effects y, [units] each; recall of the largest |effects| where there are more units than these."""
    found = {"spearman": _correlation(rankdata(x), rankdata(y)), "pearson": _correlation(x, y)}
    return found | {f"recall{top}": _recall(x, y, top) for top in TOP if top < len(y)}


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (one.astype(float) - one.mean(dtype=float) for one in (x, y))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def _recall(x: np.ndarray, y: np.ndarray, top: int) -> float:
    first, other = (set(np.argpartition(-np.abs(one), top)[:top].tolist()) for one in (x, y))
    return len(first & other) / top


def miss_rows(exact: Record, estimate: Record, unit: str, outcome: str) -> list[dict[str, Any]]:
    """Rows of misses.csv of one kind of unit and outcome, the largest difference first."""
    there, guessed = _both(exact, estimate, unit, outcome)
    wrong = np.abs(guessed.values - there.values)
    first = np.argsort(-np.nan_to_num(wrong).ravel(), kind="stable")[:MOST_MISSES]
    index, rows = index_axis(exact, unit), []
    for flat in first:
        place = np.unravel_index(int(flat), wrong.shape)
        at = {str(dim): there[dim].values[i].item() for dim, i in zip(there.dims, place, strict=True)}
        effect, estimated = float(there.values[place]), float(guessed.values[place])
        if not np.isfinite(effect - estimated):
            break
        row = {"unit": unit, "outcome": outcome, "pair": at["pair"], "layer": at["layer"], "index": at.get(index, "")}
        row |= {"position": at.get("position", str(exact.request.get("position", ""))), "exact": effect, "estimate": estimated}
        rows.append({**row, "difference": estimated - effect, "reason": _reason(effect, estimated)})
    return rows


def _reason(effect: float, estimate: float) -> str:
    if effect * estimate < 0:
        return "opposite"
    ratio = abs(estimate) / max(abs(effect), 1e-30)
    return "overshoot" if ratio > 2 else "undershoot" if ratio < 0.5 else "in part"


def scatter(exact: Record, estimate: Record, units: list[str], outcome: str) -> go.Figure:
    """Estimates against exact effects: of each kind the largest, and a sample of the others."""
    plot = canvas(520, f"exact effect on {outcome}", f"estimate ({estimate.table.attrs['method']})")
    ends = [0.0]
    for number_of, unit in enumerate(units):
        y, x = (one.values.ravel() for one in _both(exact, estimate, unit, outcome))
        known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        largest = known[np.argsort(-np.abs(y[known]), kind="stable")]
        rest = np.random.default_rng(0).permutation(largest[MOST_POINTS // 2 :])[: MOST_POINTS // 2]
        kept = np.concatenate([largest[: MOST_POINTS // 2], rest])
        marker = {"size": 5, "opacity": 0.6, "color": CATEGORICAL[number_of % len(CATEGORICAL)]}
        plot.add_scattergl(x=y[kept], y=x[kept], mode="markers", name=unit, marker=marker)
        ends += [float(y[kept].min()), float(y[kept].max())] if len(kept) else []
    plot.add_scatter(x=[min(ends), max(ends)], y=[min(ends), max(ends)], mode="lines", name="estimate = effect", line={"color": "#9aa5b1"})
    return plot


def write_agreement(exact: Record, estimate: Record, out: Path) -> list[dict[str, Any]]:
    """Writes agreement.csv, misses.csv and agreement.html into `out`; returns the rows of whole runs."""
    units = check_runs(exact, estimate)
    each = [(unit, outcome) for outcome in exact.outcomes for unit in units]
    rows = [row for unit, outcome in each for row in agreement_rows(exact, estimate, unit, outcome)]
    misses = [row for unit, outcome in each for row in miss_rows(exact, estimate, unit, outcome)]
    columns = ["unit", "outcome", "layer", "position", "pairs", "units"]
    columns += [f"{name}{end}" for name in ("spearman", "pearson", *(f"recall{top}" for top in TOP)) for end in ("", "_low", "_high")]
    write_csv(out / AGREEMENT, rows, columns)
    write_csv(out / MISSES, misses)
    parts = [
        _part(f"scatter-{at}", f"Estimates against exact effects: {outcome}", LEAD, scatter(exact, estimate, units, outcome), AGREEMENT,
              [row for row in rows if row["outcome"] == outcome], columns)
        for at, outcome in enumerate(exact.outcomes)
    ]  # fmt: skip
    shown = [name for name in misses[0]] if misses else []
    parts.append(_part("misses", "Worst misses", MISSED, _errors(misses), MISSES, misses, shown))
    write_text(out / PAGE, _page(exact, estimate, parts, out))
    return [row for row in rows if row["layer"] == row["position"] == "all"]


def _errors(misses: list[dict[str, Any]]) -> go.Figure:
    """Exact effect and estimate of the worst misses."""
    plot = canvas(360, "exact effect", "difference of the estimate")
    for number_of, reason in enumerate(dict.fromkeys(row["reason"] for row in misses)):
        own = [row for row in misses if row["reason"] == reason]
        marker = {"size": 7, "color": CATEGORICAL[number_of % len(CATEGORICAL)]}
        text = [f"{row['unit']} {row['layer']} {row['index']}, {row['pair']}" for row in own]
        x, y = ([row[name] for row in own] for name in ("exact", "difference"))
        plot.add_scatter(x=x, y=y, mode="markers", name=reason, marker=marker, hovertext=text)
    return plot


_TEXTS = ("unit", "outcome", "layer", "position", "pair", "reason", "index", "pairs", "units")


def _part(
    name: str, title: str, caption: str, plot: go.Figure, file: str, rows: list[dict[str, Any]], columns: list[str]
) -> dict[str, Any]:
    """A figure and its table, as the template of studies takes them."""
    cells = [[str(row.get(one, "")) if one in _TEXTS else number(row.get(one)) for one in columns] for row in rows]
    texts = [at for at, one in enumerate(columns) if one in ("unit", "outcome", "pair", "reason")]
    about = {"id": name, "title": title, "caption": caption, "data": embedded(plot), "file": file}
    return {**about, "columns": columns, "texts": texts, "rows": cells}


def _page(exact: Record, estimate: Record, parts: list[dict[str, Any]], out: Path) -> str:
    model, method = exact.manifest.get("model", {}).get("name", "a model"), estimate.table.attrs["method"]
    folders = {"exact": str(exact.folder), "estimate": str(estimate.folder)}
    return page_of(
        "study.html.j2",
        title=f"Agreement of {method} with exact effects: {model}",
        lead=LEAD,
        facts=[("Model", str(model)), ("Method", str(estimate.table.attrs.get("method_told", method))), *folders.items()],
        notes=("Recall: the part of the largest |effects| of a pair that is among the largest |estimates|, as many of each.",),
        parts=parts,
        manifest=json.dumps(estimate.request, indent=2, default=str),
        versions=", ".join(f"{name} {version}" for name, version in last_versions(estimate.run).items()),
        redraw=f"jaxmed agreement --exact {folders['exact']} --estimate {folders['estimate']} --out {out}",
    )
