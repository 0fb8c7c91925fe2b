"""What may lie in a run's folder, and what makes two runs the same run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError, all_problems
from jaxmed.files import TMP, check_path, file_digest, simple
from jaxmed.runs.lock import LOCK, RUN

TABLES, MADE = "tables", "made"
"""Entries of RUN that hold digests: of tables, and of files that are made again from the results at every --resume."""
PICTURES = "report-"
"""What the names of pictures beside a run's page begin with; they are legal everywhere."""


@dataclass(frozen=True)
class Legal:
    """What a folder may hold.

    Attributes:
        names: files and folders; RUN and what is left of half-written ones (.tmp) are legal everywhere.
        begins: what other names may begin with.
        needed: names without which there is nothing to continue: the run begins anew.
        measured: tables, which are worth nothing without RUN: it says what they are of, and holds their digests.
    """

    names: tuple[str, ...]
    begins: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


def check_folder(out: Path, resume: bool, legal: Legal) -> bool:
    """Whether a run can begin or continue in `out`, before anything is loaded; returns True if it holds one to continue.

    Raises:
        UserError: a path that cannot be written, a file instead of a folder, foreign files, or a run and no --resume.
    """
    check_path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder; nothing was written.")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = {one for name in (RUN, *legal.names) for one in (name, name + TMP)} | {LOCK}
    foreign = sorted(name for name in held if name not in ours and not name.startswith((*legal.begins, PICTURES)))
    if foreign:
        shown = ", ".join(ascii(name)[1:-1][:80] for name in foreign[:5]) + f" and {len(foreign) - 5} more" * (len(foreign) > 5)
        raise UserError(f"--out {out} holds something else ({shown}). Give a new or empty folder; nothing was written.")
    if RUN in held and not resume:
        raise UserError(f"--out {out} holds a run already. Add --resume to continue it, or give another folder; nothing was written.")
    nameless = sorted(held & set(legal.measured)) if RUN not in held else []
    if nameless:
        raise UserError(f"--out {out} holds {nameless[0]} without {RUN}, so nobody can say what it is of. Give a new folder.")
    return {RUN, *legal.needed} <= held


def check_same(out: Path, stored: Mapping[str, Any], now: Mapping[str, Any], reused: Sequence[str] = ()) -> None:
    """Raises a UserError where the manifest of a run in `out` is not that of the run that would continue it; see `RunFolder.open`."""
    now = simple(now)
    different = [key for key in {**now, **stored} if key not in reused and not _same(stored.get(key), now.get(key))]
    if different:
        shown = "\n".join(f"  - {key}: {_differ(stored.get(key), now.get(key))}" for key in different)
        raise UserError(
            f"--resume: {out} holds a run of another request:\n{shown}\nUse the same settings, or another --out. Nothing was written."
        )


def _same(stored: Any, now: Any) -> bool:
    """Whether two entries agree. A model is its weights, whatever path or name it was loaded by."""
    if isinstance(stored, dict) and isinstance(now, dict) and stored.get("weights") and {"name", "weights"} <= now.keys():
        return {**stored, "name": now["name"]} == now
    return stored == now


def _differ(stored: Any, now: Any) -> str:
    """What differs between two values, the innermost parts of mappings and lists."""
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = [key for key in now if stored.get(key) != now[key]] or [key for key in stored if key not in now]
        return ", ".join(f"{key}: {_differ(stored.get(key), now.get(key))}" for key in keys[:3])
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        at = next(at for at, pair in enumerate(zip(stored, now, strict=True)) if pair[0] != pair[1])
        return f"entry {at + 1}: {_differ(stored[at], now[at])}"
    return f"{str(stored)[:120]} there, {str(now)[:120]} now"


def digests_of(folder: Path, measured: Sequence[str]) -> dict[str, str]:
    """Name -> SHA-256 of the tables that a folder holds."""
    return {name: file_digest(folder / name) for name in measured if (folder / name).is_file()}


def check_tables(folder: Path, record: Mapping[str, Any], entry: str = TABLES, all_there: bool = False) -> None:
    """Raises a UserError where tables of a run hold other bytes than its last session left; one that was killed has noted none.

    Args:
        record: what RUN holds.
        entry: of the record, with the digests.
        all_there: whether no table may be missing: the run does not go on now, but is read.
    """
    noted = record.get(entry) if record.get("status") != "running" else None
    noted = noted if isinstance(noted, dict) else {}
    wrong = [
        name for name, digest in digests_of(folder, [name for name in noted if Path(name).name == name]).items() if digest != noted[name]
    ]
    told = [f"{name} holds other bytes than the run wrote" for name in wrong]
    told += [f"{name} is missing" for name in noted if Path(name).name == name and all_there and not (folder / name).is_file()]
    if told:
        fix = "Put them back as they were, or delete them: --resume computes them again."
        raise all_problems(f"{folder} is damaged, or was changed", told, fix)


def check_space(folder: Path, needed: int) -> None:
    """Raises a UserError if the disk has no room for `needed` bytes."""
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < needed:
        raise UserError(f"--out {folder} needs up to {needed / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB free. Nothing was written.")
