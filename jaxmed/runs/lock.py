"""Who writes to a folder: one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError, notice
from jaxmed.files import is_number, read_json

RUN, LOCK = "run.json", ".lock"


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a folder; raises a UserError where it cannot be read."""
    record = read_json(folder / RUN, "the record of a run")
    if not is_record(record):
        raise UserError(f"{folder / RUN} is no record of a run. Give another folder.")
    return record


def is_record(held: Any) -> bool:
    """Whether a value from a file can be the record of a run: a manifest with names, and sessions with seconds."""
    if not isinstance(held, dict) or not isinstance(held.get("manifest", {}), dict) or not isinstance(held.get("sessions", []), list):
        return False
    sessions = held.get("sessions", [])
    return all(is_number(one.get("seconds", 0.0) if isinstance(one, dict) else one) for one in sessions)


@contextmanager
def hold(folder: Path, lock: str = LOCK, out: Path | None = None) -> Iterator[None]:
    """Keeps other writers out of an existing folder, or of the file `out` in it; raises a UserError where there is one.

    The kernel drops the lock with its process, however that ends. The file goes too, but after a kill, when it locks nobody out. (The
    library filelock leaves it behind always.)
    """
    path, out = folder / lock, out or folder
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}. Give another one; nothing was written.") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            fix = "Wait for it, or give another one; nothing was written."
            raise UserError(f"--out {out} is in use{_by_whom(folder / RUN if out == folder else out)}. {fix}") from None
        except OSError as error:
            notice(f"{out} cannot be locked ({error.strerror}): see to it that no other run writes there.")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                break
        os.close(handle)  # its last holder removed the file before it was locked here
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a process writes to a folder now. Disturbs none: the lock is tried for reading, and dropped at once."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _by_whom(file: Path) -> str:
    try:
        session = read_json(file, "the record of a run")["sessions"][-1]
        return f" by process {session['pid']} on {session['host']}, which began at {session['started']}"
    except (UserError, LookupError, TypeError):
        return " by another process"
