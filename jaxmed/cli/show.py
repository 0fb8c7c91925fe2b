"""Tables that commands show."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from jaxmed.files import read_csv
from jaxmed.runs.watch import err, lines, out, progress, speed

__all__ = ["err", "lines", "out", "progress", "speed", "top_units"]

COLUMNS = {"outcome": "left", "layer": "right", "index": "right", "position": "right", "mean": "right", "share": "right", "p": "right"}


def top_units(folder: Path, count: int = 12) -> None:
    """The first rows of a run's top.csv; columns that hold one value throughout are left out."""
    rows = read_csv(folder / "top.csv")
    for unit in dict.fromkeys(row["unit"] for row in rows):
        of_unit = [row for row in rows if row["unit"] == unit][:count]
        table = Table(title=f"{unit}: largest mean effects (all in {folder / 'top.csv'})", title_justify="left")
        columns = [name for name in COLUMNS if name in ("layer", "mean", "share") or len({row[name] for row in of_unit}) > 1]
        for name in columns:
            table.add_column(name, justify=COLUMNS[name])  # type: ignore[arg-type]
        table.add_column("pairs agreeing")
        promotes = any(row["promotes"] for row in of_unit)
        if promotes:
            table.add_column("output vector promotes", no_wrap=True, overflow="ellipsis")
        for row in of_unit:
            cells = [*(_short(row[name]) for name in columns), row["pairs_agreeing"], *([row["promotes"]] if promotes else [])]
            table.add_row(*(escape(cell) for cell in cells))
        out.print(table)


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}" if "." in text or "e" in text else text
    except ValueError:
        return text
