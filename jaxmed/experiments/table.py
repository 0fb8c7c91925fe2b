"""Tables of experiments: CSV files whose rows are kept one by one, so that an interrupted run goes on after its last row."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmed import results
from jaxmed.errors import UserError
from jaxmed.runs.provenance import versions

Row = dict[str, Any]
TEXTS = ("rule", "mask", "attack", "set", "model", "behaviour", "reached")
"""Columns that hold names, whatever they look like."""


class Table:
    """Rows that are kept as they come; those of an earlier run are there from the start.

    Attributes:
        key: columns that say which row it is.
        rows: all of them.
    """

    def __init__(self, key: Sequence[str], file: Path | None = None, report: Callable[[Row], None] = lambda row: None):
        """A table in `file`, or in memory; `report` is called with every new row."""
        self.key, self.file, self.report = tuple(key), file, report
        self.rows = [] if file is None else read_rows(file)

    def has(self, *values: Any) -> bool:
        """Whether there is a row with these values of the key."""
        return any(tuple(row[column] for column in self.key) == values for row in self.rows)

    def add(self, row: Row) -> None:
        """Keeps a row."""
        self.rows.append(row)
        if self.file is not None:
            write_rows(self.file, self.rows)
        self.report(row)


def continued(key: Sequence[str], file: Path, report: Callable[[float, int, str], None]) -> Table:
    """The table in a file; tells a display of progress what an earlier run has done, and every new row."""
    table = Table(key, file, lambda row: report(1, 1, ""))
    if table.rows:
        report(len(table.rows), 0, "resumed")
    return table


def begin(out: Path, resume: bool, names: Iterable[str], measured: Iterable[str], manifest: Mapping[str, Any]) -> None:
    """Begins or continues a folder of tables.

    Args:
        names: what the folder may hold.
        measured: those of them that are worth nothing without the record of what they are of.

    Raises:
        UserError: foreign files; a run without `resume`, or of another request.
    """
    held = results.check_contents(out, resume, {one for name in (results.RUN, *names) for one in (name, name + ".tmp")})
    if results.RUN in held:
        results.check_same(out, results.read_run(out)["manifest"], manifest)
        return
    nameless = sorted(held & set(measured))
    if nameless:
        raise UserError(f"--out {out} holds {nameless[0]} without {results.RUN}, so nobody can say what it is of. Give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    results.write_json(out / results.RUN, {"manifest": dict(manifest), "versions": versions()})


class Examples:
    """Every example's loss, of every row of a table: columns of the key, `set`, `example`, `loss`; for later resampling."""

    def __init__(self, key: Sequence[str], file: Path | None = None):
        self.key, self.file = tuple(key), file
        self.rows = [] if file is None else read_rows(file)

    def add(self, values: Sequence[Any], losses: Mapping[str, Iterable[float]]) -> None:
        """Keeps the losses of one row, in place of those an interrupted run has left."""
        named = dict(zip(self.key, values, strict=True))
        self.rows = [row for row in self.rows if any(row[column] != value for column, value in named.items())]
        self.rows += [
            {**named, "set": name, "example": number, "loss": float(loss)}
            for name, found in losses.items()
            for number, loss in enumerate(found)
        ]
        if self.file is not None:
            write_rows(self.file, self.rows)


def read_rows(file: Path) -> list[Row]:
    """The rows of a CSV file that `write_rows` wrote; numbers as numbers."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return [{key: value if key in TEXTS else _number(value) for key, value in row.items()} for row in csv.DictReader(handle)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same columns as CSV, whole or not at all."""
    partial = file.with_name(file.name + ".tmp")
    with partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(file)
