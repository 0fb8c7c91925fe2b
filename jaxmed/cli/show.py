"""Tables that commands show: legible at 80 columns and when piped."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.cells import cell_len

from jaxmed.errors import visible
from jaxmed.files import read_csv
from jaxmed.runs.watch import close_pipe, err, lines, out, progress, speed

__all__ = ["close_pipe", "err", "lines", "out", "progress", "speed", "table", "top_units"]

COLUMNS = ("outcome", "layer", "index", "position", "mean", "share", "p", "p_adjusted")
ALWAYS = ("layer", "index", "mean", "share")
TESTS = ("p", "p_adjusted")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints a table whose first `left` columns are texts and the others numbers. No cell is ever cut or torn.

    What is piped has the width that it needs. On a terminal that is too narrow for that, headers are broken into lines; where that does
    not help, the last column stands below each row; where that does not either, each row becomes a paragraph of its own.
    """
    out.print(visible(title), style="bold", markup=False)
    rows = [[visible(cell) for cell in row] for row in rows]  # names come from files
    most = out.width if out.is_terminal else None
    for count in (len(columns), len(columns) - 1):
        for shortest in (max(map(len, columns)), HEADER, 0):
            grid = _grid(columns[:count], [row[:count] for row in rows], shortest, left)
            if count < 2 or (most is not None and max(map(cell_len, grid)) > most):
                continue
            heads = len(grid) - len(rows)
            for number, line in enumerate(grid, -heads):
                out.print(line.rstrip(), markup=False)
                if number >= 0:
                    _below(columns[count:], rows[number][count:])
            return
    for row in rows:
        out.print(f"{columns[0]} {row[0]}" if row[0].isdecimal() else row[0], markup=False)
        _below(columns[1:], row[1:])


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], shortest: int, left: int) -> list[str]:
    """The lines of a table, headers broken where they are longer than their cells and than `shortest`."""
    cells = [max((cell_len(row[number]) for row in rows), default=0) for number in range(len(columns))]
    heads = [_broken(column, max(cell, shortest)) for column, cell in zip(columns, cells, strict=True)]
    widths = [max(cell, *map(len, head)) for cell, head in zip(cells, heads, strict=True)]
    deepest = max(map(len, heads))
    titles = [[""] * (deepest - len(head)) + head for head in heads]
    found = []
    for line in [*zip(*titles, strict=True), ["-" * width for width in widths], *rows]:
        pads = [" " * (width - cell_len(cell)) for width, cell in zip(widths, line, strict=True)]
        shown = [cell + pad if at < left else pad + cell for at, (cell, pad) in enumerate(zip(line, pads, strict=True))]
        found.append("  ".join(shown))
    return found


def _below(columns: Sequence[str], cells: Sequence[str]) -> None:
    """Cells with the names of their columns, below a row; empty ones are left out."""
    for column, cell in zip(columns, cells, strict=True):
        if not cell:
            continue
        text = textwrap.fill(f"{column}: {cell}", max(20, out.width), initial_indent="  ", subsequent_indent="    ")
        out.print(text, markup=False)


HEADER = 9
"""Letters of a header's line at least, where headers are broken."""


def _broken(column: str, width: int) -> list[str]:
    """A header in lines of at most `width` letters, broken at spaces and underscores, and within longer words."""
    width = max(width, 6)
    found: list[str] = []
    for word in column.replace("_", "_ ").split(" "):
        parts = [word[at : at + width] for at in range(0, len(word), width)]
        joint = "" if found and found[-1].endswith("_") else " "
        if found and len(found[-1] + joint + parts[0]) <= width:
            found[-1] += joint + parts.pop(0)
        found += parts
    return found


def top_units(folder: Path, ranked: str, count: int = 12) -> None:
    """The first rows of a run's top.csv, of all pairs and of every category; columns that hold one value throughout are left out.

    Args:
        ranked: what they are ranked by; see `statistics.ranked_by`.
    """
    parts: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_csv(folder / "top.csv"):
        parts.setdefault((row["unit"], row.get("category", "")), []).append(row)
    for (unit, category), rows in parts.items():
        method = rows[0].get("method", "")
        values = f"estimates ({method})" if method and "verified" not in rows[0] else f"effects{f' ({method})' if method else ''}"
        largest = f"mean {values}" if ranked.startswith("|mean|") else f"{ranked} of {values}" if method else ranked
        title = f"{unit}{f', category {category}' if category else ''}: largest {largest} (all in {folder / 'top.csv'})"
        _show_top(title, rows[: CATEGORY_ROWS if category else count])


CATEGORY_ROWS = 3
"""Units of a category that are shown."""


def _show_top(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    told = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    columns = [name for name in told if name in ALWAYS or _varies(name, rows)]
    weakest, promotes = (any(row.get(name) for row in rows) for name in ("weakest_category", "promotes"))
    cells = []
    for row in rows:
        more = [f"{_cut(row['weakest_category'], 16)} {_short(row['weakest_mean'])}"] if weakest else []
        more += [_cut(row["promotes"], 20 if weakest else 28)] if promotes else []
        cells.append([*(_short(row[name]) for name in columns), row["pairs_agreeing"], *more])
    names = [*columns, "pairs agreeing", *(["weakest in"] if weakest else []), *(["output vector promotes"] if promotes else [])]
    table(title, names, cells, int("outcome" in columns))


def _varies(name: str, rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether a column says something: p values wherever there are some, others where they differ."""
    values = {row.get(name, "") for row in rows}
    return bool(values - {"", "nan"}) if name in TESTS else len(values) > 1


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}" if "." in text or "e" in text else text
    except ValueError:
        return text
