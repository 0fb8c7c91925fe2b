"""Digests of files that other programs write, kept beside them and compared when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxmed.errors import all_problems
from jaxmed.files.whole import read_text, write_text

SUMS = "SHA256SUMS"
"""Digests of the files beside it, in the format of the command `sha256sum`."""


def write_sums(folder: Path, files: Sequence[Path]) -> None:
    """Writes the SHA-256 of files in a folder, as FOLDER/SHA256SUMS."""
    with ThreadPoolExecutor() as pool:
        found = zip(files, pool.map(file_digest, files), strict=True)
    write_text(folder / SUMS, "".join(f"{digest}  {file.relative_to(folder).as_posix()}\n" for file, digest in found))


def check_sums(folder: Path) -> None:
    """Compares the files of a folder with its SHA256SUMS; a folder without one passes.

    Raises:
        UserError: files that are missing or hold other bytes, by name.
    """
    if not (folder / SUMS).is_file():
        return
    said = [line.partition("  ")[::2] for line in read_text(folder / SUMS).splitlines() if line.strip()]
    names = [name for _, name in said]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: file_digest(folder / name) if (folder / name).is_file() else "", names))
    problems = [
        f"{name} {'holds other bytes' if has else 'is missing'}" for (digest, name), has in zip(said, found, strict=True) if has != digest
    ]
    if problems:
        fix = f"Copy them again; if they were changed on purpose, delete {folder / SUMS}."
        raise all_problems(f"{folder}: its files are not those that {SUMS} names", problems, fix)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
