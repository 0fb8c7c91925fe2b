"""Scores of prompts as lines of JSON. They are kept batch by batch in a file of their own, from which an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from jaxmed.errors import UserError
from jaxmed.files import PART, check_file, parse_json, read_text, simple, write_text
from jaxmed.runs.legal import check_same
from jaxmed.runs.lock import LOCK, hold


class Lines:
    """An open file of lines.

    Attributes:
        kept: the lines of earlier runs, in whole batches.
    """

    def __init__(self, handle: TextIO, kept: list[dict[str, Any]]):
        self.kept, self._handle = kept, handle

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Keeps the lines of a batch."""
        self._handle.writelines(_line(one) for one in lines)
        self._handle.flush()


def part_of(out: Path) -> Path:
    """The file in which lines are kept until all are there."""
    return out.with_name(out.name + PART)


def check_lines(out: Path, resume: bool) -> None:
    """Raises a UserError where lines cannot be written to `out`, or where there are some already."""
    check_file(out)
    check_file(part_of(out))
    if out.exists():
        raise UserError(f"--out {out} exists already{': it is finished' * resume}. Give another name; nothing was written.")
    if part_of(out).exists() and not resume:
        fix = "Add --resume to continue it, give another name, or delete that file"
        raise UserError(f"{part_of(out)} holds the lines of an interrupted run. {fix}; nothing was written.")


@contextmanager
def open_lines(out: Path, manifest: Mapping[str, Any], resume: bool, batch: int) -> Iterator[Lines]:
    """Begins or continues the lines of `out`, which is there when the block has ended.

    Args:
        manifest: all that decides a line.
        batch: lines that are added at once.

    Raises:
        UserError: what `check_lines` raises; lines of another request; another writer.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold(out.parent, f".{out.name}{LOCK}", out):
        check_lines(out, resume)
        file = part_of(out)
        kept = _kept(file, manifest) if file.exists() else []
        kept = kept[: len(kept) - len(kept) % batch]
        write_text(file, "".join(map(_line, [{"manifest": manifest}, *kept])))
        with file.open("a", encoding="utf-8") as handle:
            yield Lines(handle, kept)
        write_text(out, read_text(file).partition("\n")[2])
        file.unlink()


def _kept(file: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of an earlier run of the same request."""
    first, *others = read_text(file, "lines of an interrupted run").splitlines(keepends=True) or [""]
    try:
        check_same(file, parse_json(first)["manifest"], manifest)
        return [parse_json(line) for line in others if line.endswith("\n")]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file} holds no lines of an interrupted run. Give another --out, or delete that file.") from None


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(simple(values)) + "\n"
