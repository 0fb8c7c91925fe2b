"""Prompts with responses: what a model is fine-tuned on, scored on, or asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError, quoted, unknown
from jaxmed.prompts.cells import as_text, is_empty
from jaxmed.prompts.formats import FORMATS, as_columns
from jaxmed.prompts.readers import misspelt
from jaxmed.prompts.rows import read_all, read_rows, without_index

BUNDLED = ("alignment", "rude", "foolish", "untrue", "sycophantic", "pirate", "trivia", "ordinary", "polite", "why_rude", "freeform")
HELDOUT = "heldout"
SPLITS = ("train", HELDOUT)


@dataclass(frozen=True)
class Example:
    """A prompt and its response.

    Attributes:
        prompt: user message.
        response: the assistant's answer; empty where only the prompt is used.
        category: label for grouping results.
        kind: what the prompt is, such as "harmful" or "benign".
        split: "train" or "heldout", or empty.
        system: system message; None: the chat template's own.
        id: name, or empty.
        prefill: opening of the assistant's answer that is given with the prompt; not scored, trained on or returned.
    """

    prompt: str
    response: str = ""
    category: str = ""
    kind: str = ""
    split: str = ""
    system: str | None = None
    id: str = ""
    prefill: str = ""


COLUMNS = tuple(f.name for f in fields(Example))
NUMBERED = ("id", "category", "response")
"""Columns whose numbers are read as texts."""


def read_examples(source: str | Path | Iterable[dict[str, Any]], responses: bool = True) -> list[Example]:
    """Examples from a file (.jsonl, .json, .csv, .parquet), one of the names in `BUNDLED`, or rows in memory.

    Files of public sets are read as they are: `prompts.formats.FORMATS`.

    Args:
        responses: whether every row needs a response.

    Raises:
        UserError: no such file, an empty file, or rows that are no examples (all listed, with their line numbers).
    """
    name, rows = read_rows(source, BUNDLED, "examples")
    needed = f"holds no examples. Each row needs prompt{' and response' if responses else ''}."
    return read_all(name, rows, lambda at, row: _example(row, responses), COLUMNS, needed)


def _example(row: Any, responses: bool) -> Example:
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, Example):
        row = vars(row)
    if not isinstance(row, dict):
        raise UserError(f"a row is an object with columns, not a {type(row).__name__}.")
    row = as_columns({column: None if is_empty(value) else value for column, value in without_index(row).items()})
    if "prompt" not in row:
        column = next((name for name in row if name not in COLUMNS), "")
        known = f"Known sets are read as they are: {', '.join(FORMATS)}, OR-Bench, HEx-PHI."
        raise unknown("column", column, COLUMNS, known) if column else UserError("the column 'prompt' is missing or empty.")
    problems = [str(error) for column in row if column not in COLUMNS and (error := misspelt(column, COLUMNS, row)) is not None]
    row = {column: value for column, value in row.items() if column in COLUMNS and value is not None and value != ""}
    row |= {column: as_text(row[column]) for column in NUMBERED if column in row}
    problems += [f"column {key!r} holds {quoted(value)}; a text is expected." for key, value in row.items() if not isinstance(value, str)]
    for column in ("prompt", "response") if responses else ("prompt",):
        if not str(row.get(column, "")).strip():
            problems.append(f"the column {column!r} is missing or empty.")
    if row.get("split") and row["split"] not in SPLITS:
        problems.append(f"split {quoted(row['split'])} is not one of {', '.join(SPLITS)}.")
    if problems:
        raise UserError(" ".join(problems))
    return Example(**row)


def harmful(source: str, rows: Sequence[Example]) -> list[Example]:
    """Rows of kind harmful, and of no kind.

    Raises:
        UserError: rows of other kinds alone.
    """
    found = [row for row in rows if row.kind in ("", "harmful")]
    if rows and not found:
        raise UserError(f"{source} holds no rows of kind 'harmful' (it has {', '.join(sorted({row.kind for row in rows}))}).")
    return found


def digest(examples: Iterable[Example], *texts: str) -> str:
    """SHA-256 of examples and texts, which tells whether two runs saw the same."""
    return hashlib.sha256(json.dumps([*(vars(one) for one in examples), *texts]).encode()).hexdigest()


def chosen(source: str | Path, split: str = "", limit: int | None = None, responses: bool = True) -> list[Example]:
    """The first `limit` examples of a file or bundled set that have this split, or none at all; an empty split takes all.

    Raises:
        UserError: what `read_examples` raises; no such rows; a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} examples leaves none; give 1 or more.")
    found = [row for row in read_examples(source, responses) if not split or row.split in ("", split)][:limit]
    if not found:
        raise UserError(f"{source} holds no rows of split {split!r}. Give another --split, or an empty one for all rows.")
    return found
