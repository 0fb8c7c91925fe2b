"""SHA-256 of files: read once, remembered beside what tells a changed file; blobs of the Hugging Face cache are named by theirs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from functools import cache
from pathlib import Path

from jaxmed.files import is_whole, sealed
from jaxmed.models.folders import cache_folder

SETTLED = 2.0
"""Seconds after its last change from which a digest is remembered: a file that is written again sooner may keep its time stamps."""
State = tuple[str, int, int, int, int]
BLOB = re.compile("[0-9a-f]{64}")


def digest(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def known_digest(file: Path) -> str:
    """The same without reading a file that was read before, or that the hub client keeps under its digest.

    A remembered digest holds while size, inode and the times of the last change of content and entry are the same.
    """
    named = _blob_name(file)
    if named:
        return named
    file = file.resolve()
    state, note = list(file_state(file)), _note(file)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        held = json.loads(note.read_text(encoding="utf-8"))
        if is_whole(held) and held["file"] == state and BLOB.fullmatch(held["digest"]):
            return held["digest"]
    now = digest(file)
    if time.time() - max(int(at) for at in state[3:]) / 1e9 > SETTLED and state == list(file_state(file)):
        _remember(note, {"file": state, "digest": now})
    return now


def remember(file: Path, sha256: str) -> None:
    """Notes a digest that was just taken of a file."""
    file = file.resolve()
    _remember(_note(file), {"file": list(file_state(file)), "digest": sha256})


@cache
def code_digest(folder: Path) -> str:
    """SHA-256 of the Python files under a folder of this package."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(f"{file.relative_to(folder)} ".encode() + file.read_bytes())
    return found.hexdigest()


def file_state(file: Path) -> State:
    """What tells a changed file without reading it: its path, size, inode, and the times of the last change of content and entry."""
    found = file.stat()
    return (str(file.resolve()), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


def _blob_name(file: Path) -> str | None:
    """The digest in the name of a blob: snapshots of the hub client are links to `blobs/SHA-256`."""
    target = Path(os.path.realpath(file))
    return target.name if file.is_symlink() and target.parent.name == "blobs" and BLOB.fullmatch(target.name) else None


def _note(file: Path) -> Path:
    """Where a digest is noted; another place than that of versions before notes were sealed, which would take the seal for the digest."""
    return cache_folder() / "digests" / f"{hashlib.sha256(str(file).encode(errors='surrogateescape')).hexdigest()[:32]}.sealed.json"


def _remember(note: Path, content: dict[str, object]) -> None:
    """Writes a note; where the cache cannot be written, the file is read again next time."""
    part = note.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(sealed(content)), encoding="utf-8")
        part.replace(note)
