"""Tables that commands show: legible at 80 columns and when piped."""

from __future__ import annotations

import io
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from jaxmed.files import read_csv
from jaxmed.runs.watch import err, lines, out, progress, speed

__all__ = ["close_pipe", "err", "lines", "out", "progress", "speed", "table", "top_units"]

COLUMNS = {"outcome": "left", "layer": "right", "index": "right", "position": "right", "mean": "right", "share": "right", "p": "right"}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints a table whose first `left` columns are texts and the others numbers. No column is ever narrower than its cells.

    On a terminal that is too narrow, each row becomes a paragraph of its own; what is piped has the width that it needs.
    """
    drawn = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        # a header may break at underscores and spaces, a cell nowhere
        words = max(len(word) for word in column.replace("_", "_ ").split(" ") or [""])
        width = max([words, *(len(row[number]) for row in rows)])
        drawn.add_column(escape(_broken(column, width)), justify="left" if number < left else "right", no_wrap=False, min_width=width)
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    needed = Measurement.get(out, out.options.update(width=10_000), drawn).minimum
    if needed <= out.width or not out.is_terminal:
        drawn.title = None
        out.print(f"[bold]{escape(title)}[/bold]")
        out.print(drawn, width=max(needed, out.width if out.is_terminal else needed), crop=False)
        return
    out.print(f"[bold]{escape(title)}[/bold]")
    for row in rows:
        out.print(row[0], markup=False)
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                out.print(
                    textwrap.fill(f"{column}: {cell}", max(20, out.width), initial_indent="  ", subsequent_indent="    "), markup=False
                )


def _broken(column: str, width: int) -> str:
    """A header of several lines, none longer than `width` where its words allow it."""
    found: list[str] = []
    for word in column.replace("_", "_ ").split(" "):
        joint = "" if found and found[-1].endswith("_") else " "
        if found and len(found[-1] + joint + word) <= width:
            found[-1] += joint + word
        else:
            found.append(word)
    return "\n".join(found)


def top_units(folder: Path, count: int = 12) -> None:
    """The first rows of a run's top.csv; columns that hold one value throughout are left out."""
    rows = read_csv(folder / "top.csv")
    for unit in dict.fromkeys(row["unit"] for row in rows):
        of_unit = [row for row in rows if row["unit"] == unit][:count]
        columns = [name for name in COLUMNS if name in ("layer", "mean", "share") or len({row[name] for row in of_unit}) > 1]
        promotes = any(row["promotes"] for row in of_unit)
        cells = [
            [*(_short(row[name]) for name in columns), row["pairs_agreeing"], *([_cut(row["promotes"], 34)] if promotes else [])]
            for row in of_unit
        ]
        title = f"{unit}: largest mean effects (all in {folder / 'top.csv'})"
        table(title, [*columns, "pairs agreeing", *(["output vector promotes"] if promotes else [])], cells, int("outcome" in columns))


def close_pipe() -> None:
    """What is still to be printed goes nowhere: the reader of the pipe has gone."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a standard output without a file
        sys.stdout = io.StringIO()


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}" if "." in text or "e" in text else text
    except ValueError:
        return text
