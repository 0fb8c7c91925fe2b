"""Digests of files that other programs write, kept beside them and compared when they are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxmed.errors import all_problems
from jaxmed.files.whole import read_text, write_text

SUMS = "jaxmed.sha256"
"""Digests of the files beside it, as the command `sha256sum --check` reads them."""
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def file_digest(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_sums(folder: Path, files: Iterable[Path]) -> None:
    """Writes the SHA-256 of files in a folder beside them."""
    files = sorted(files)
    with ThreadPoolExecutor() as pool:
        found = zip(files, pool.map(file_digest, files), strict=True)
    write_text(folder / SUMS, "".join(f"{digest}  {file.relative_to(folder).as_posix()}\n" for file, digest in found))


def check_sums(folder: Path, digest: Callable[[Path], str] = file_digest) -> None:
    """Compares the files of a folder with the digests beside them; a folder without digests passes.

    Args:
        digest: SHA-256 of a file; one that remembers files which did not change since saves reading them again.

    Raises:
        UserError: files that are missing or hold other bytes, by name; a file of digests that is damaged itself.
    """
    if not (folder / SUMS).exists() and not (folder / SUMS).is_symlink():
        return
    lines = [LINE.fullmatch(line) for line in read_text(folder / SUMS, "digests").splitlines()]
    said = {folder / line[2]: line[1] for line in lines if line}
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda file: digest(file) if file.is_file() else "", said))
    wrong = [(file, has) for (file, wanted), has in zip(said.items(), found, strict=True) if has != wanted]
    problems = [f"{file.relative_to(folder)} {'holds other bytes' if has else 'is missing'}" for file, has in wrong]
    problems += [f"{SUMS} is damaged"] * (None in lines or not lines)
    if problems:
        fix = f"Copy them again. If the files were changed on purpose, delete {folder / SUMS}."
        raise all_problems(f"{folder}: its files are not those that {SUMS} names", problems, fix)
