"""One self-contained HTML page from saved results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError
from jaxmed.files import check_file, write_text
from jaxmed.reports.cautions import cautions
from jaxmed.reports.figures import columns, figures
from jaxmed.reports.html import page_of
from jaxmed.reports.packed import embedded
from jaxmed.reports.record import Record, read
from jaxmed.reports.tables import facts, provenance, ranked_by, top_tables


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Writes one HTML file with a section per run folder, and returns its path.

    The file works offline (plotly.js is inside, once) and appears whole or not at all. It is drawn from `effects.zarr`, `run.json`
    and `top.csv` alone; unfinished runs show what is there and say so.

    Raises:
        UserError: no folder, a folder without a run, or `out` that cannot be written.
    """
    if not folders:
        raise UserError("There is nothing to report. Give at least one --out folder of a sweep.")
    check_file(Path(out))
    records = [read(Path(folder)) for folder in folders]
    page, out = render(records), Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The report cannot be written to {out}: {error.strerror or error}. Give another file.") from None
    write_text(out, page)
    return out


def render(records: Sequence[Record]) -> str:
    """The page as text."""
    width = columns(list(records))
    sections = [section(record, width, f"run{number}") for number, record in enumerate(records, 1)]
    models = ", ".join(dict.fromkeys(str(record.manifest.get("model", {}).get("name", "a model")) for record in records))
    return page_of("report.html.j2", sections=sections, models=models)


def section(record: Record, columns: int, name: str) -> dict[str, Any]:
    """What the template shows of one run; `name` is the prefix of its element ids."""
    parts = []
    for at, outcome in enumerate(record.outcomes):
        drawn = [
            {"id": f"{name}-{at}-{number}", "title": figure.title, "caption": figure.caption, "data": embedded(figure.plot)}
            for number, figure in enumerate(figures(record, outcome, columns))
        ]
        parts.append({"outcome": outcome, "figures": drawn})
    return {
        "id": name,
        "title": record.folder.resolve().name,
        "facts": facts(record),
        "cautions": cautions(record),
        "parts": parts,
        "tables": top_tables(record),
        "ranked": "; ".join(ranked_by(record)),
        "has_top": record.top is not None,
        **provenance(record),
    }
