"""Pairs from files, Hugging Face datasets and the files bundled with the package; plain texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError, quoted, unknown
from jaxmed.prompts.cells import as_text, is_empty
from jaxmed.prompts.pair import KINDS, PromptPair, expected
from jaxmed.prompts.rows import read_all, read_rows, without_index

BUNDLED = ("harm", "control", "facts")
COLUMNS = tuple(f.name for f in fields(PromptPair) if f.name != "extra")
NUMBERED = ("id", "category", "group", "split", "control", "target", "foil", "response")
"""Columns whose numbers are read as texts."""
TEXTS = ("neutral", "neutral-short")


def read_pairs(source: str | Path | Iterable[dict[str, Any]]) -> list[PromptPair]:
    """Pairs from a file, a bundled name, a Hugging Face dataset (any iterable of rows), or rows in memory.

    Columns that a pair does not know are kept in `PromptPair.extra`.

    Args:
        source: a path ending in .jsonl, .json, .csv, .tsv or .parquet; one of the bundled names "harm", "control", "facts"; or rows.
            In csv files, lists are JSON or texts separated by "|".

    Raises:
        UserError: no such file, an empty file, or rows that are no pairs (all listed, with their line numbers).
    """
    name, rows = read_rows(source, BUNDLED, "pairs")
    seen: dict[str, str] = {}

    def one(at: str, row: Any) -> PromptPair:
        pair = _pair(row)
        if pair.id in seen:
            raise UserError(f"id {quoted(pair.id)} was used before, at {seen[pair.id]}.")
        seen[pair.id] = at
        return pair

    return read_all(name, rows, one, COLUMNS, "holds no pairs. Each row needs id, base, source, target and foil.")


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
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{quoted(str(source))} is not UTF-8 text: {error}.") from None


def _pair(row: Any) -> PromptPair:
    if not isinstance(row, dict):
        raise UserError(f"a row is an object with columns, not a {type(row).__name__}.")
    row = without_index(row)
    given = {key: value for key, value in row.items() if key in COLUMNS and not is_empty(value)}
    given |= {key: as_text(given[key]) for key in NUMBERED if key in given}
    problems = [str(error) for column in row if column not in COLUMNS and (error := misspelt(column, COLUMNS, row)) is not None]
    if not given.get("id"):
        problems.append("the column 'id' is missing or empty.")
    for key, value in given.items():
        if not isinstance(value, KINDS.get(key, str)):
            problems.append(f"column {key!r} holds {quoted(value)}; {expected(key)} is expected.")
    if problems:
        raise UserError(" ".join(problems))
    extra = {**(row.get("extra") or {})} if isinstance(row.get("extra"), dict) else {}
    extra |= {key: value for key, value in row.items() if key not in COLUMNS and key != "extra"}
    return PromptPair(**given, extra=extra)


def misspelt(column: Any, legal: Iterable[str], row: Iterable[str]) -> UserError | None:
    """The error for a column that is probably meant to be one of the legal ones; None for columns of another kind.

    One letter off is enough, and more where the row lacks the legal one.
    """
    names = tuple(legal)
    return unknown("column", column, names) if _is_misspelt(str(column).strip().lower(), names, frozenset(map(str, row))) else None


@lru_cache(4096)
def _is_misspelt(low: str, names: tuple[str, ...], row: frozenset[str]) -> bool:
    lacking = [name for name in names if name not in row]
    near = any(len(name) > 3 and not low[-1:].isdecimal() and _letters_off(low, name) <= 1 for name in names)
    return low in names or near or bool(difflib.get_close_matches(low, lacking, n=1, cutoff=0.8))


def _letters_off(one: str, other: str) -> int:
    same = sum(block.size for block in difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks())
    return max(len(one), len(other)) - same
