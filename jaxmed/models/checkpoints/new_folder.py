"""A folder that appears whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxmed.errors import UserError
from jaxmed.files import check_path


def check_vacant(folder: Path, size: int) -> None:
    """Checks that `folder` can be made and filled with `size` bytes.

    Raises:
        UserError: it is a file, it holds something, or its disk has too little room.
    """
    check_path(folder, "The folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Give a folder that does not exist yet, or an empty one.")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if held:
        raise UserError(f"{folder} holds something already ({', '.join(held[:5])}). Give a new or empty folder; nothing was written.")
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < size:
        raise UserError(f"{folder} needs {size / 1e6:,.1f} MB; {free / 1e6:,.1f} MB are free there. Nothing was written.")


@contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """A scratch folder beside `folder`, to be filled inside the block and renamed to `folder` at its end.

    An error or Ctrl-C inside removes it; only a killed process leaves it behind, under the name `FOLDER.partial-...`.

    Args:
        folder: must be absent or empty.
        size: bytes about to be written.

    Raises:
        UserError: `folder` cannot be made or filled, or the disk refuses a write.
    """
    check_vacant(folder, size)
    folder = folder.resolve()
    scratch = folder.with_name(f"{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        scratch.rename(folder)
    except OSError as error:
        raise UserError(f"Could not write {folder}: {error}. Nothing was kept.") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
