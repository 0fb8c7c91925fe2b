"""Rows of jsonl, json, csv and parquet files, as people publish them, each with its place in the file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from jaxmed.errors import UserError, all_problems, quoted, unknown
from jaxmed.files import odd_text, parse_json
from jaxmed.prompts.cells import plain, read_cell
from jaxmed.prompts.formats import FORMATS

T = TypeVar("T")
Rows = Iterable[tuple[str, Any]]
"""(place, columns); a row that cannot be read is an exception in their stead."""
INDEX = re.compile(r"|unnamed: \d+(\.\d+)?|index|idx|__index_level_\d+__|level_\d+", re.IGNORECASE)
"""Names of columns that only count rows, as spreadsheets and pandas add them."""
WITHOUT_HEADER = re.compile(r"category_\d+\.csv")
"""Names of HEx-PHI's files: lists of prompts."""
NAMES = {"prompt", *(column for one in FORMATS.values() for column in one.columns)}
"""Names of columns with prompts: a first line of one of them is a header."""
BYTE_ORDER = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""First bytes of a file -> its encoding, as spreadsheets and PowerShell write it."""


class RefusedRows(UserError):
    """Rows of a file that are refused.

    Attributes:
        others: what was made of the other rows.
    """

    def __init__(self, message: object, others: Sequence[Any]):
        super().__init__(message)
        self.others = list(others)


def read_rows(source: str | Path | Iterable[dict[str, Any]], bundled: Collection[str], what: str) -> tuple[str, Rows]:
    """What a source is called, and its rows.

    Args:
        source: a path ending in .jsonl, .json (a list of rows), .csv, .tsv or .parquet; one of the names `bundled` with the package; or
            rows.
        what: what the rows are, in words.

    Raises:
        UserError: no such file, or one of another type.
    """
    if hasattr(source, "iterrows"):  # a table of pandas
        source = source.to_dict("records")  # type: ignore[union-attr]
    if not isinstance(source, (str, Path)):
        return "rows", ((f"row {i + 1}", row) for i, row in enumerate(source))
    if str(source) in bundled and not Path(source).exists():
        path = resources.files("jaxmed.prompts") / "data" / f"{source}.jsonl"
        return f"bundled {what} {str(source)!r}", _jsonl(path.read_text(encoding="utf-8"))
    path = Path(source)
    if not path.is_file():
        known = "Give one of these bundled names, or a path to a .jsonl, .json, .csv, .tsv or .parquet file."
        raise unknown(f"{what} file", str(source), bundled, known)
    if path.suffix.lower() not in READERS:
        raise unknown(f"type of {what} file {quoted(path.name)}:", path.suffix, READERS)
    return quoted(str(path)).strip("'"), READERS[path.suffix.lower()](path)


def read_all(name: str, rows: Rows, read: Callable[[str, Any], T], columns: Sequence[str], empty: str) -> list[T]:
    """Every row as `read(place, columns)` makes it.

    Args:
        name: what the source is called.
        columns: the legal ones, for the message.
        empty: what is said of a source without rows.

    Raises:
        RefusedRows: rows that `read` refuses or that could not be read, all listed with their places.
        UserError: no rows.
    """
    found: list[T] = []
    problems: list[str] = []
    for at, row in rows:
        try:
            if isinstance(row, Exception):
                raise UserError(str(row))
            if isinstance(row, dict):
                row = {key: plain(value) for key, value in row.items()}
            if said := odd_text(vars(row) if hasattr(row, "__dataclass_fields__") else row):
                raise UserError(f"{said}.")
            found.append(read(at, row))
        except UserError as error:
            problems.append(f"{at}: {error}")
    if problems:
        raise RefusedRows(all_problems(name, problems, f"Columns: {', '.join(columns)}."), found)
    if not found:
        raise UserError(f"{name} {empty}")
    return found


def without_index(row: dict[str, Any]) -> dict[str, Any]:
    """A row without columns that only count."""
    return {key: value for key, value in row.items() if not INDEX.fullmatch(str(key))}


def _text(path: Path) -> str:
    """A file's text, without a byte-order mark, which tells UTF-16 from UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode(BYTE_ORDER.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{quoted(str(path))} is not UTF-8 text: {error}. Save it as UTF-8.") from None


def _jsonl(text: str) -> Iterator[tuple[str, Any]]:
    """Rows between line feeds alone: U+2028 and the like are characters of texts."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", parse_json(line)
        except ValueError as error:
            yield f"line {number}", error


def _read_json(path: Path) -> Rows:
    text = _text(path)
    try:
        rows = parse_json(text)
    except ValueError as error:
        if "Extra data" in str(error):  # rows on lines, under the other name
            return _jsonl(text)
        raise UserError(f"{quoted(str(path))}: {error}.") from None
    if isinstance(rows, dict):
        lists = [held for held in rows.values() if isinstance(held, list)]
        rows = lists[0] if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) else rows
    if not isinstance(rows, list):
        raise UserError(f"{quoted(str(path))} holds a {type(rows).__name__}; a list of rows is expected.")
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a csv file, cells as texts; empty ones are texts too."""
    csv.field_size_limit(1 << 24)
    text = _text(path)
    first = text.lstrip("\r\n").partition("\n")[0]
    delimiter = "," if "," in first else "\t" if "\t" in first else ";" if ";" in first and " " not in first else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = next((line for line in reader if line), [])
        if _is_prompt(header, bool(WITHOUT_HEADER.fullmatch(path.name))):
            yield f"line {reader.line_num}", {"prompt": header[0] if header else ""}
            header = ["prompt"]
        header = [name.strip() for name in header]
        if twice := sorted({name for name in header if name and header.count(name) > 1}):
            raise UserError(f"{quoted(str(path))} has the column {quoted(twice[0])} twice.")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                said = f"{len(row)} fields, more or fewer than the header's {len(header)}; quote texts that hold a {delimiter!r}"
                yield f"line {reader.line_num}", ValueError(said)
                continue
            try:
                yield f"line {reader.line_num}", {key: read_cell(key, value) for key, value in zip(header, row, strict=True)}
            except ValueError as error:
                yield f"line {reader.line_num}", error
    except csv.Error as error:
        raise UserError(f"{quoted(str(path))} is no CSV file: {error}, at line {reader.line_num}.") from None


def _is_prompt(header: Sequence[str], listed: bool) -> bool:
    """Whether the first line of a csv file is a prompt, as the others are.

    Args:
        listed: whether the file's name says that it is a list of prompts.

    Raises:
        UserError: a first line that is neither a prompt alone nor names of columns.
    """
    alone = len(header) == 1 and header[0].strip().lower() not in NAMES
    if alone and (listed or _is_sentence(header[0])):
        return True
    if alone or (not NAMES & {name.strip().lower() for name in header} and any(_is_sentence(name) for name in header)):
        said = f"Its first line, {quoted(','.join(header))}, is read as names of columns."
        raise UserError(f"{said} If it is a prompt, write `prompt` on a line before it, and quote texts that hold a ','.")
    return False


def _is_sentence(cell: str) -> bool:
    """Whether a cell has several words or ends like a sentence."""
    return len(cell.split()) > 2 or cell.rstrip().endswith((".", "?", "!"))


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{quoted(str(path))} is not a readable parquet file: {error}.") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": lambda path: _jsonl(_text(path)),
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""Ending of a file's name -> its reader."""
