"""Pages that begin with verdicts, from saved tables alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError
from jaxmed.files import check_file, read_csv, write_text
from jaxmed.reports.html import page_of
from jaxmed.reports.packed import embedded
from jaxmed.reports.style import Figure, number
from jaxmed.runs.folder import last_versions, read_run, time_of

VERDICTS = "verdicts.csv"


def finished_run(folder: Path, key: str, command: str) -> dict[str, Any]:
    """The record of a finished study.

    Raises:
        UserError: a folder without one.
    """
    run = read_run(folder)
    if key not in run.get("manifest", {}) or not (folder / VERDICTS).is_file():
        raise UserError(f"{folder} holds no finished {command}. Give the --out folder of `jaxmed {command}`; --resume finishes it.")
    return run


def write_verdicts(
    folder: Path,
    out: Path | None,
    title: str,
    lead: str,
    facts: Sequence[tuple[str, str]],
    drawn: Sequence[Figure],
    tables: Sequence[Path],
    shown: Sequence[str],
) -> Path:
    """Writes the page of a study's folder (default: its report.html), and returns its path. The file works offline.

    Args:
        facts: (name, value) beside the model, the pairs (where there are some) and the time.
        tables: CSV files that are shown below the figures.
        shown: entries of the manifest that are.
    """
    out = out or folder / "report.html"
    check_file(out)
    run, manifest = read_run(folder), read_run(folder)["manifest"]
    time = time_of(run)
    pairs = [("Pairs", str(len(manifest["pairs"])))] if "pairs" in manifest else []
    models = [manifest[key]["name"] for key in ("model", "source_model") if key in manifest]
    page = page_of(
        "verdicts.html.j2",
        title=title,
        lead=lead,
        facts=[("Model", " against ".join(models)), *pairs, *facts, ("Time", time)],
        verdicts=[{**row, "numbers": numbers(row)} for row in read_csv(folder / VERDICTS)],
        parts=[{"id": f"part-{at}", "title": f.title, "caption": f.caption, "data": embedded(f.plot)} for at, f in enumerate(drawn)],
        tables=[_table(file) for file in tables if file.is_file()],
        manifest=json.dumps({key: manifest[key] for key in shown if key in manifest}, indent=2, ensure_ascii=False),
        versions=", ".join(f"{name} {version}" for name, version in last_versions(run).items()),
        redraw=f"jaxmed report {shlex.quote(str(folder))}",
    )
    write_text(out, page)
    return out


def _table(file: Path) -> dict[str, Any]:
    rows = read_csv(file)
    cells = [[value if value == "" or not _fraction(value) else number(value) for value in row.values()] for row in rows]
    return {"file": file.name, "columns": list(rows[0]), "rows": cells}


def _fraction(value: str) -> bool:
    """Whether a cell holds a number with a fraction, or none that is finite."""
    return value == "nan" or ("." in value and value.replace(".", "").replace("-", "").replace("e", "").replace("+", "").isdecimal())


def numbers(row: dict[str, str]) -> str:
    """The estimate of a verdict with its interval or p, as far as there are some."""
    found = row["estimate"] if row["estimate"].isdecimal() else number(row["estimate"])
    found += f" ({number(row['low'])} to {number(row['high'])})" if row["low"] not in ("", "nan") else ""
    return found + (f", p = {number(row['p'])}" if row["p"] not in ("", "nan") else "")
