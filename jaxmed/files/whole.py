"""Text and JSON, written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.errors import UserError, quoted
from jaxmed.files.parse import parse_json
from jaxmed.files.paths import IRREGULAR, TMP, is_irregular


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to. At the end of the block its bytes are put on the disk, and it is renamed to `file`.

    Raises:
        UserError: the disk refuses, or something else than a file has its name; it is as it was before.
    """
    partial = file.with_name(file.name + TMP)
    if is_irregular(file):
        raise UserError(f"{quoted(str(file))} {IRREGULAR}. Give a file; nothing was written.")
    try:
        if partial.is_symlink() or is_irregular(partial):
            partial.unlink()
        yield partial
        _sync(partial)
        partial.replace(file)
        _sync(file.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written: {error.strerror or error}. What was finished before is kept.") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Puts a file, or the names of a folder, on the disk; a file system that cannot is left as it is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def write_text(file: Path, text: str) -> None:
    """Writes text as UTF-8; characters that UTF-8 cannot hold (half of a surrogate pair) are written out as \\udXXX."""
    with atomic(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(file: Path, what: str = "text") -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        UserError: no such file, or bytes that are not UTF-8.
    """
    if is_irregular(file):
        raise UserError(f"{file} ({what}) {IRREGULAR}.")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} ({what}) cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} ({what}) is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. Save it as UTF-8."
        ) from None


def write_json(file: Path, content: Any) -> None:
    """Writes JSON that every reader takes: numbers that are not finite become null, other line separators are escaped."""
    write_text(file, json.dumps(simple(content), indent=1, allow_nan=False) + "\n")


def read_json(file: Path, what: str = "JSON") -> Any:
    """The content of a JSON file; raises a UserError where it cannot be read."""
    try:
        return parse_json(read_text(file, what))
    except ValueError as error:
        raise UserError(f"{file} cannot be read as {what}: {error}.") from None


def simple(value: Any) -> Any:
    """A value as JSON holds it: numpy numbers as numbers, tuples as lists, what is not finite as None, anything else as text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): simple(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [simple(held) for held in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
