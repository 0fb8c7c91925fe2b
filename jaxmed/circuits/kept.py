"""What a run keeps of every pair, so that an interrupted one goes on: one compressed file each, written whole and checked when read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from jaxmed.files import atomic

FOLDER = "kept"
Arrays = dict[str, np.ndarray]


def keep(out: Path, name: str, arrays: Arrays) -> None:
    """Keeps arrays under a name."""
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    with atomic(folder / f"{name}.npz") as partial, partial.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)


def recall(out: Path, name: str) -> Arrays | None:
    """What is kept under a name; None where nothing is, or what cannot be read, which is then computed again."""
    file = out / FOLDER / f"{name}.npz"
    try:
        with np.load(file, allow_pickle=False) as held:
            return {key: held[key] for key in held.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def is_kept(out: Path, name: str) -> bool:
    """Whether something is kept under a name that can be read."""
    return (out / FOLDER / f"{name}.npz").exists() and recall(out, name) is not None
