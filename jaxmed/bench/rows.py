"""The Markdown file that measurements are added to, such as BENCHMARKS.md."""

from __future__ import annotations

from pathlib import Path

from jaxmed.errors import UserError
from jaxmed.files import check_file, read_text, write_text

TITLE = "# Benchmarks\n"


def check_rows(file: Path | None, flag: str = "--append") -> None:
    """Raises a UserError where nothing can be added to a file, before anything is measured."""
    if file is not None:
        _before(file, flag)


def add_rows(file: Path, section: str) -> None:
    """Adds a section to a file, or begins it."""
    text = _before(file, "--append")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--append {file} cannot be made: {error.strerror}. Give another file.") from None
    write_text(file, text + section)


def _before(file: Path, flag: str) -> str:
    check_file(file, flag)
    return read_text(file, flag) if file.exists() else TITLE
