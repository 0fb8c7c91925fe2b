"""Tables of experiments: CSV files whose rows are kept one by one, so that an interrupted run goes on after its last row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxmed.files import NAME_COLUMNS, Row, read_csv, write_csv
from jaxmed.runs import signals
from jaxmed.runs.folder import RunFolder, Session
from jaxmed.runs.legal import Legal
from jaxmed.runs.watch import RESUMED, Watch


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
        """Keeps a row; raises `Interrupted` where a signal has come meanwhile."""
        self.rows.append(row)
        if self.file is not None:
            write_csv(self.file, self.rows)
        self.report(row)
        signals.check()


def continued(key: Sequence[str], file: Path, report: Watch) -> Table:
    """The table in a file; tells a display of progress what an earlier run has done, and every new row."""
    table = Table(key, file, lambda row: report(1, 1, ""))
    if table.rows:
        report(len(table.rows), 0, RESUMED)
    return table


@contextmanager
def begin(out: Path, resume: bool, names: Iterable[str], measured: Iterable[str], manifest: Mapping[str, Any]) -> Iterator[Session]:
    """Begins or continues a folder of tables, and holds it inside the block; see `RunFolder`.

    Args:
        names: what the folder may hold.
        measured: those of them that are worth nothing without the record of what they are of.

    Raises:
        UserError: foreign files; a run without `resume`, or of another request; another writer in the folder.
    """
    legal = Legal(tuple(names), measured=tuple(measured))
    with RunFolder.open(out, manifest, resume, legal) as folder, folder.session() as session:
        yield session


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
            write_csv(self.file, self.rows)


def read_rows(file: Path) -> list[Row]:
    """The rows of a table, numbers as numbers; none where there is no file."""
    return read_csv(file, NAME_COLUMNS) if file.is_file() else []
