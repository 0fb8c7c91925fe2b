"""What a run keeps of every pair, so that an interrupted one goes on: one compressed file each, written whole and checked when read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxmed.files import atomic
from jaxmed.runs.folder import RunFolder

FOLDER = "kept"
NAME = "kept as"
"""The array of a file that holds its name: a file under another one's name is noticed."""
Arrays = dict[str, np.ndarray]


def keep(out: Path, name: str, arrays: Arrays) -> None:
    """Keeps arrays under a name."""
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    with atomic(_file(out, name)) as partial, partial.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays, **{NAME: np.asarray(name)})


def recall(out: Path, name: str) -> Arrays | None:
    """What is kept under a name; None where nothing is, or what cannot be read or was kept under another name."""
    try:
        with _file(out, name).open("rb") as handle, np.load(handle, allow_pickle=False) as held:
            found = {key: held[key] for key in held.files}
    except Exception:  # zipfile and numpy raise many types on damaged files
        return None
    return found if str(found.pop(NAME, name)) == name else None


def is_kept(out: Path, name: str) -> bool:
    """Whether something is kept under a name that can be read."""
    return _file(out, name).exists() and recall(out, name) is not None


def mend(folder: RunFolder) -> None:
    """Removes what is kept and cannot be read, so that it is computed again, and says so.

    Raises:
        UserError: the run was finished: its numbers may be in use, so they change at the next resume alone.
    """
    damaged = [file for file in sorted((folder.path / FOLDER).glob("*.npz")) if recall(folder.path, file.stem) is None]
    for file in damaged:
        file.unlink()
    folder.tell_damage([f"{FOLDER}/{file.name} is damaged" for file in damaged])


def _file(out: Path, name: str) -> Path:
    return out / FOLDER / f"{name}.npz"
