"""Paths that results are written to: checked before anything is computed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from jaxmed.errors import UserError, quoted

TMP, PART = ".tmp", ".part"
"""What the name of a file ends with while it is written, and where it is written piece by piece."""
LONGEST_PATH, LONGEST_NAME = 4096, 255
ROOM = 200
"""Bytes of a path that the files inside a folder of results may need."""


def check_path(path: Path, what: str = "--out", inside: int = ROOM) -> None:
    """Refuses a path that nothing can be written to, before anything is.

    Args:
        what: the flag that named it.
        inside: bytes that the names below it need.

    Raises:
        UserError: NUL bytes, too long, a link that leads nowhere or in a circle, a parent that is a file, no permission.
    """

    def refuse(why: str) -> UserError:
        return UserError(f"{what} {quoted(str(path))} {why}. Give another path; nothing was written.")

    if "\0" in str(path):
        raise refuse("holds a NUL byte")
    try:
        if len(os.fsencode(path.absolute())) + inside > LONGEST_PATH or len(os.fsencode(path.name + PART + TMP)) > LONGEST_NAME:
            raise refuse("is too long")
        for link in (path, *path.absolute().parents):
            if link.is_symlink() and not link.exists():
                raise refuse(f"leads through {link}, a link to {os.readlink(link)}, which does not exist (or is a circle of links)")
        nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
        if nearest != path and not nearest.is_dir():
            raise refuse(f"lies below {nearest}, which is a file")
        if not os.access(nearest, os.W_OK):
            raise refuse(f"cannot be written ({nearest} is read-only, or belongs to somebody else)")
    except (OSError, ValueError) as error:  # ValueError: characters that no path can hold
        reason = {errno.ELOOP: "is a circle of links", errno.ENAMETOOLONG: "is too long"}.get(getattr(error, "errno", 0) or 0)
        raise refuse(reason or f"cannot be used ({getattr(error, 'strerror', None) or error})") from None


IRREGULAR = "is no regular file (a folder, pipe, device, or a link to nothing)"
"""What is said of what stands where a file belongs: reading it may never end, and passing it over may lose what counts."""


def is_irregular(path: Path) -> bool:
    """Whether there is something under a name, and it is no file."""
    return (path.exists() or path.is_symlink()) and not path.is_file()


def check_file(path: Path, what: str = "--out") -> None:
    """Refuses a path that no single file can be written to; see `check_path`."""
    check_path(path, what, inside=len(TMP))
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder. Give a file; nothing was written.")
    if is_irregular(path):
        raise UserError(f"{what} {quoted(str(path))} {IRREGULAR}. Give a file; nothing was written.")
