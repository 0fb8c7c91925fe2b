"""What a folder of activations holds, and whether all of it can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.cache.store import DONE, LABELS, MANIFEST, damaged_shards, shard_of, told
from jaxmed.errors import UserError
from jaxmed.files import read_json
from jaxmed.files.arrays import open_checked, reason
from jaxmed.interventions.sites import ALIASES, SITES
from jaxmed.results import damaged_labels
from jaxmed.runs.folder import read_run
from jaxmed.runs.watch import Watch, silent


@dataclass(frozen=True)
class Held:
    """What a folder of activations holds.

    Attributes:
        manifest: what it is of: model, form, sites, positions, prompts, tokens, versions.
        status: of the run that writes it: finished, interrupted, killed, running, failed.
        done: bool [prompt].
        arrays: site -> (shape, bytes of it whole).
        shard: prompts that are written together.
    """

    folder: Path
    manifest: Mapping[str, Any]
    status: str
    done: np.ndarray
    arrays: Mapping[str, tuple[tuple[int, ...], int]]
    shard: int


def read_held(folder: Path) -> Held:
    """What a folder of activations holds, without reading them.

    Raises:
        UserError: no such folder, or one of something else; an array or its markers cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds no activations ({MANIFEST} is missing). Give the --out folder of `jaxmed cache write`.")
    manifest = read_json(folder / MANIFEST, "the manifest of activations")
    sites = manifest.get("sites") if isinstance(manifest, dict) and isinstance(manifest.get("model", {}), dict) else None
    if not isinstance(sites, list) or not sites or not all(name in (*SITES, *ALIASES) for name in sites):
        raise UserError(f"{folder / MANIFEST} names no sites. It was damaged; write the activations anew in another folder.")
    arrays = {name: open_checked(folder / name, str(folder / name)) for name in sites}
    sizes = {name: (tuple(array.shape), int(np.prod(array.shape)) * array.dtype.numpy_dtype.itemsize) for name, array in arrays.items()}
    try:
        done = np.asarray(open_checked(folder / DONE, str(folder / DONE)).read().result()).astype(bool)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / DONE}: {reason(error)}. Continue the run with `jaxmed cache write --resume`.") from None
    return Held(folder, manifest, str(read_run(folder).get("status", "")), done, sizes, shard_of(folder / sites[0]))


def verify(held: Held, report: Watch = silent) -> list[str]:
    """Reads every finished shard of every site, and all labels; what is damaged, a line each: site, prompts, why."""
    labels = damaged_labels(held.folder, [name for name in LABELS if (held.folder / name).is_dir()])
    found = damaged_shards(held.folder, list(held.arrays), held.done, report)
    return [*(f"{name}: {why}" for name, why in labels.items()), *(f"{name}, {told(prompts)}: {why}" for name, prompts, why in found)]
