"""Pairs from jsonl, csv and parquet files, from Hugging Face datasets, and from the files bundled with the package."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from jaxmed.errors import UserError, all_problems, unknown
from jaxmed.prompts.pair import PromptPair

T = TypeVar("T")
BUNDLED = ("harm", "control", "facts")
COLUMNS = tuple(f.name for f in fields(PromptPair) if f.name != "extra")
_LISTS = ("target", "foil")


def read_pairs(source: str | Path | Iterable[dict[str, Any]]) -> list[PromptPair]:
    """Pairs from a file, a bundled name, a Hugging Face dataset (any iterable of rows), or rows in memory.

    Args:
        source: a path ending in .jsonl, .csv or .parquet; one of the bundled names "harm", "control", "facts"; or rows.
            In csv files, lists are JSON or texts separated by "|".

    Raises:
        UserError: no such file, an empty file, or rows that are no pairs (all listed, with their line numbers).
    """
    return _check(*read_rows(source, BUNDLED, "pairs"))


def read_rows(source: str | Path | Iterable[dict[str, Any]], bundled: Collection[str], what: str) -> tuple[str, Iterable[tuple[str, Any]]]:
    """What a source is called, and its rows as (place, columns); a row that cannot be read is an exception in their stead.

    Args:
        source: a path ending in .jsonl, .json (a list of rows), .csv or .parquet; one of the names `bundled` with the package; or rows.
        what: what the rows are, in words.

    Raises:
        UserError: no such file, or one of another type.
    """
    if not isinstance(source, (str, Path)):
        return "rows", ((f"row {i + 1}", row) for i, row in enumerate(source))
    if str(source) in bundled and not Path(source).exists():
        path = resources.files("jaxmed.prompts") / "data" / f"{source}.jsonl"
        return f"bundled {what} {str(source)!r}", _jsonl(path.read_text(encoding="utf-8"))
    path = Path(source)
    if not path.is_file():
        raise unknown(
            f"{what} file", str(source), bundled, "Give one of these bundled names, or a path to a .jsonl, .json, .csv or .parquet file."
        )
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise unknown(f"type of {what} file {path.name!r}:", path.suffix, readers)
    return str(path), readers[path.suffix](path)


TEXTS = ("neutral", "neutral-short")


def read_text(source: str | Path) -> str:
    """A plain text file, or the bundled text "neutral"; "neutral-short" is every other paragraph of that.

    Raises:
        UserError: no such file, or one that is not UTF-8 text.
    """
    path = Path(source)
    if str(source) in TEXTS and not path.exists():
        text = (resources.files("jaxmed.prompts") / "data" / "neutral.txt").read_text(encoding="utf-8")
        return "\n\n".join(text.split("\n\n")[::2]) if str(source) == "neutral-short" else text
    if not path.is_file():
        raise unknown("text file", str(source), TEXTS, "Give one of these bundled names, or a path to a plain text file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text: {error}.") from None


def _check(name: str, rows: Iterable[tuple[str, Any]]) -> list[PromptPair]:
    seen: dict[str, str] = {}

    def one(at: str, row: Any) -> PromptPair:
        pair = _pair(row)
        if pair.id in seen:
            raise UserError(f"id {pair.id!r} was used before, at {seen[pair.id]}.")
        seen[pair.id] = at
        return pair

    return read_all(name, rows, one, COLUMNS, "holds no pairs. Each row needs id, base, source, target and foil.")


def read_all(name: str, rows: Iterable[tuple[str, Any]], read: Callable[[str, Any], T], columns: Sequence[str], empty: str) -> list[T]:
    """Every row as `read(place, columns)` makes it.

    Args:
        name: what the source is called.
        columns: the legal ones, for the message.
        empty: what is said of a source without rows.

    Raises:
        UserError: rows that `read` refuses or that could not be read, all listed with their places; no rows.
    """
    found: list[T] = []
    problems: list[str] = []
    for at, row in rows:
        try:
            if isinstance(row, Exception):
                raise UserError(str(row))
            found.append(read(at, row))
        except UserError as error:
            problems.append(f"{at}: {error}")
    if problems:
        raise all_problems(name, problems, f"Columns: {', '.join(columns)}.")
    if not found:
        raise UserError(f"{name} {empty}")
    return found


def _pair(row: Any) -> PromptPair:
    if not isinstance(row, dict):
        raise UserError(f"a row is an object with columns, not a {type(row).__name__}.")
    for column in row:
        if column not in COLUMNS:
            raise unknown("column", column, COLUMNS)
    given = {key: value for key, value in row.items() if value is not None}
    if not given.get("id"):
        raise UserError("the column 'id' is missing or empty.")
    for key, value in given.items():
        legal = (str, list, tuple) if key in _LISTS else (dict,) if key == "messages" else (str,)
        if not isinstance(value, legal):
            raise UserError(f"column {key!r} holds {value!r}; a {' or '.join(kind.__name__ for kind in legal)} is expected.")
    return PromptPair(**given)


def _jsonl(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            yield f"line {number}", ValueError(f"not valid JSON: {error}")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        return _jsonl(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}.") from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}; a list of rows is expected.")
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


WITHOUT_HEADER = re.compile(r"category_\d+\.csv")
"""Names of HEx-PHI's files: lists of prompts."""


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 24)
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, ["prompt"] if WITHOUT_HEADER.fullmatch(path.name) else None)
            for row in reader:
                at = f"line {reader.line_num}"
                if None in row or None in row.values():
                    yield at, ValueError("more or fewer fields than the header has")
                    continue
                yield at, {key: _csv_field(key, value) for key, value in row.items() if value != ""}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file in UTF-8: {error}.") from None


def _csv_field(column: str, value: str) -> Any:
    if column not in (*_LISTS, "messages"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value.split("|")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}.") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row
