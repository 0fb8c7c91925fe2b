"""CSV files: one writer and one reader."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError
from jaxmed.files.whole import atomic

NAME_COLUMNS = ("rule", "mask", "attack", "set", "model", "behaviour", "reached")
"""Columns of experiments' tables that hold names, whatever they look like."""
_FORMULA = tuple("=+-@\t\r")
Row = dict[str, Any]


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Writes rows as CSV. What is missing or None becomes an empty cell; text that a spreadsheet would run gets a ' in front.

    Args:
        columns: their order; default: that of the first row.
    """
    columns = list(columns or rows[0])
    with atomic(file) as partial, partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column, "")) for column in columns] for row in rows)


def read_csv(file: Path, texts: Collection[str] | None = None) -> list[Row]:
    """The rows of a file that `write_csv` wrote.

    Args:
        texts: columns that are read as text; the others as numbers, where they hold some. None: all are.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        with file.open(newline="", encoding="utf-8", errors="backslashreplace") as handle:
            rows = [{key: _text(value or "") for key, value in row.items() if key} for row in csv.DictReader(handle)]
    except (OSError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as CSV: {getattr(error, 'strerror', None) or error}.") from None
    if texts is None:
        return rows
    return [{key: value if key in texts else _number(value) for key, value in row.items()} for row in rows]


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip("'").startswith(_FORMULA) and isinstance(_number(value), str):
        return "'" + value
    return value


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA) else cell


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
