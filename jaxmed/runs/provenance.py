"""What computed a result: the versions of the libraries, and the commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from jaxmed.hosts import for_all


def commit() -> str | None:
    """The git commit of a source checkout of this package, with "+" where files are changed; None for an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    git = lambda *arguments: subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True).stdout.strip()  # noqa: E731
    found = git("rev-parse", "HEAD")
    return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if found else None


def short_commit() -> str:
    """Twelve digits of `commit`, with its "+"; "unknown" for an installed package."""
    found = commit() or "unknown"
    return found[:12] + "+" * found.endswith("+")


def versions() -> dict[str, str | None]:
    """Versions of what computed a result."""
    names = ("jaxmed", "jax", "jaxlib", "flax", "numpy", "tensorstore", "zarr", "xarray", "transformers")
    found = {name: metadata.version(name) for name in names if _installed(name)}
    return {"python": platform.python_version(), **found, "commit": commit()}


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def command() -> dict[str, str]:
    """The command line of this process under "command", where it is one of jaxmed; else nothing."""
    program = Path(sys.argv[0])
    ours = program.name in ("jaxmed", "jaxmed.exe") or program.parts[-3:] == ("jaxmed", "cli", "main.py")
    return {"command": shlex.join(["jaxmed", *for_all(sys.argv[1:])])} if ours else {}
