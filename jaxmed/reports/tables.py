"""Rows of text for the page: the facts of a run, its top units, its provenance."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.reports.record import Record, is_partial, labels, mean_total, noise_floor, used_pairs
from jaxmed.reports.screen import screen
from jaxmed.reports.stability import stability
from jaxmed.reports.style import MISSING, count, number, percent, spans

MOST_ROWS = 200
MOST_CATEGORIES = 8


@dataclass(frozen=True)
class Table:
    """Top units of one kind, of one category of pairs or of all ("")."""

    unit: str
    category: str
    columns: list[str]
    rows: list[list[str]]
    total: int

    @property
    def size(self) -> str:
        return count(len(self.rows), "row")


_TEXTS = ("promotes", "suppresses")
_SOME = ("index", "expert", "t", "p_margin", "weakest in", *_TEXTS)
"""Columns that are left out where they are empty."""


def top_tables(record: Record) -> list[Table]:
    """One table per kind of unit and category, from top.csv; columns that hold nothing for a kind are left out."""
    parts: dict[tuple[str, str], list[dict[str, str]]] = {(unit, ""): [] for unit in record.units}
    for row in record.top or []:
        parts.setdefault((row.get("unit", ""), row.get("category", "")), []).append(row)
    found = []
    for (unit, category), rows in parts.items():
        if not rows:
            continue
        cells = [_cells(row) for row in rows[: MOST_ROWS * len(record.outcomes)]]
        names = [name for name in cells[0] if name not in _SOME or any(cell[name] for cell in cells)]
        found.append(Table(unit, category, names, [[cell[name] for name in names] for cell in cells], len(rows)))
    return found


def ranked_by(record: Record) -> list[str]:
    """What the units are ranked by; one entry for every answer among the kinds of units."""
    return list(dict.fromkeys(str(one.attrs["ranked"]) for one in record.table.data_vars.values() if "ranked" in one.attrs)) or ["|mean|"]


def _cells(row: dict[str, str]) -> dict[str, str]:
    """One row of top.csv as it is shown."""
    plain = {name: row.get(name) or "" for name in ("rank", "layer", "index", "expert", "position", "outcome")}
    if plain["expert"]:
        plain["expert"] = f"expert {plain['expert']}, neuron {row.get('expert_neuron')}"
    low, high = number(row.get("ci_low"), ""), number(row.get("ci_high"), "")
    return {
        **plain,
        "mean": number(row.get("mean")),
        "share": percent(row.get("share")),
        "95 % interval": f"[{low}, {high}]" if low and high else MISSING,
        "t": number(row.get("t"), ""),
        "p": number(row.get("p")),
        "p_adjusted": number(row.get("p_adjusted")),
        "q": number(row.get("q")),
        "p_margin": number(row.get("p_margin"), ""),
        "pairs agreeing": row.get("pairs_agreeing") or MISSING,
        "weakest in": f"{row['weakest_category']}: {number(row.get('weakest_mean'))}" if row.get("weakest_category") else "",
        **{name: row.get(name) or "" for name in _TEXTS},
    }


def facts(record: Record) -> list[tuple[str, str]]:
    """Label and value of what a reader needs beside the numbers."""
    model, sessions = record.manifest.get("model", {}), record.run.get("sessions", [])
    dates = list(dict.fromkeys(str(session.get("started", ""))[:10] for session in sessions))
    revision = f" @ {model['revision']}" if model.get("revision") else ""
    found = [
        ("Model", f"{model.get('name', 'not recorded')}{revision}"),
        ("Weights", f"{str(model.get('weights', 'not recorded'))[:12]}"),
        ("Precision", str(model.get("dtype", "not recorded"))),
        ("Device", f"{record.manifest.get('device', 'not recorded')}{_mesh(record)}"),
        ("Date", " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "not recorded"),
        ("Outcome", ", ".join(record.outcomes)),
        ("Position", str(record.request.get("position", "not recorded"))),
        *((("Patch", f"{record.table.attrs['patch']}: {told}"),) if (told := record.table.attrs.get("patch_told")) else ()),
        ("Pairs", _pairs(record)),
        ("Layers swept", f"{spans(record.layers)} of {record.table.sizes['layer']}"),
        ("Effects computed" if record.exact else record.values.capitalize(), f"{_effects(record):,}"),
        *((("Method", str(record.table.attrs.get("method_told", record.table.attrs["method"]))),) if not record.exact else ()),
        ("Passes", f"{sum(session.get('passes', 0) for session in sessions):,}"),
        ("Time", f"{number(sum(session.get('seconds', 0) for session in sessions))} s"),
    ]
    several = len(record.outcomes) > 1
    for outcome in record.outcomes:
        about = f" ({outcome})" if several else ""
        found.append((f"Mean total{about}", number(mean_total(record, outcome))))
        found += [(f"Noise floor{about}", number(noise_floor(record, outcome)))] if record.exact or record.screened else []
    attributes = next((record.table[f"{unit}_mean"].attrs for unit in record.units if f"{unit}_mean" in record.table), {})
    if attributes and not is_partial(record):
        found += [
            ("Intervals", str(attributes.get("interval", MISSING)).split(":")[0]),
            ("Smallest p", number(attributes.get("smallest_p"))),
            *stability(record.table),
        ]
    found += screen(record.table)
    return found


def _mesh(record: Record) -> str:
    shards = int(np.prod(list(record.manifest.get("mesh", {}).values()) or [1]))
    return f" x {shards}" if shards > 1 else ""


def _pairs(record: Record) -> str:
    categories, groups = (dict.fromkeys(name for name in labels(record, label) if name) for label in ("category", "group"))
    control = int((labels(record, "control") != "").sum())
    named = f": {', '.join(categories)}" if 0 < len(categories) <= MOST_CATEGORIES else ""
    held = f"; {count(control, 'control pair')} left out of the means" if control and control < record.table.sizes["pair"] else ""
    used = f" ({len(used_pairs(record))} used so far)" if is_partial(record) else ""
    return f"{record.table.sizes['pair']}{used} in {count(len(groups), 'group')}, {count(len(categories), 'category')}{named}{held}"


def _effects(record: Record) -> int:
    """Finite effects in the table, counted pair by pair."""
    return sum(
        int(np.isfinite(record.table[unit].isel(pair=pair).values).sum())
        for unit in record.units
        for pair in range(record.table.sizes["pair"])
    )


def provenance(record: Record) -> dict[str, Any]:
    """Request, sessions and commit of a run; token ids stay in run.json."""
    manifest = {key: value for key, value in record.manifest.items() if key != "tokens"}
    answers = [json.dumps(answer, sort_keys=True) for answer in manifest.get("answers", [])]
    if len(answers) > 1 and len(set(answers)) == 1:
        manifest["answers"] = {"of every pair": manifest["answers"][0]}
    sessions = record.run.get("sessions", [])
    versions = (sessions[-1] if sessions else {}).get("versions", {})
    commits = [source["commit"] for source in (*sessions[::-1], versions, record.run) if source.get("commit")]
    return {
        "manifest": _pretty(manifest),
        "sessions": _pretty({"status": record.run.get("status"), "plan": record.run.get("plan"), "sessions": sessions}),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "commit") or "not recorded",
        "commit": str(commits[0]) if commits else "not recorded",
        "redraw": f"jaxmed report {shlex.quote(str(record.folder))}",
    }


def _pretty(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, default=str)
