"""Where a fine-tuning run stands, on disk: what is trained, the optimiser's state, the best so far, and every loss.

OUT/checkpoint-STEP appears whole or not at all; the one before it is removed afterwards, so a killed run always has one to continue from.

Orbax's CheckpointManager is not used: it would take the place of `found`, `clean` and the removal in `save`, a dozen lines. The rest stays
whatever writes the step: arrays are held against what is expected (Orbax casts, pads and cuts in silence), a full disk becomes one message,
digests are written before the folder gets its name, and old folders are continued; its threads would save a step that is being donated.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import jax

from jaxmed.errors import UserError
from jaxmed.files import check_sums, read_json, write_json, write_sums
from jaxmed.models.checkpoints.new_folder import new_folder
from jaxmed.models.checkpoints.orbax_store import restore_arrays, save_arrays

STATE, PROGRESS = "arrays", "progress.json"
BEGINS = "checkpoint-"


def save(out: Path, step: int, arrays: dict[str, Any], progress: dict[str, Any]) -> None:
    """Writes the checkpoint of a step, then removes older ones.

    Args:
        arrays: pytrees by name.
        progress: JSON values.

    Raises:
        UserError: the disk is full; the older checkpoint stays.
    """
    flat = _flat(arrays)
    target = out / f"{BEGINS}{step:07d}"
    if target.exists():  # of the same step: written just before the run was killed
        return
    with new_folder(target, sum(leaf.nbytes for leaf in flat.values())) as scratch:
        save_arrays(flat, scratch / STATE)
        write_json(scratch / PROGRESS, {"step": step, **progress})
        write_sums(scratch, sorted(path for path in scratch.rglob("*") if path.is_file()))
    for old in found(out):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def found(out: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob(f"{BEGINS}[0-9]*") if path.is_dir() and ".partial" not in path.name)


def clean(out: Path, finished: bool = False) -> None:
    """Removes what a killed process left half-written, and with `finished` every checkpoint."""
    for path in out.glob(f"{BEGINS}*"):
        if finished or ".partial" in path.name:
            shutil.rmtree(path, ignore_errors=True)


def restore(folder: Path, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, progress) of a checkpoint; `like` are pytrees of arrays of the same shapes, dtypes and shardings.

    Raises:
        UserError: a damaged checkpoint, or one of other arrays.
    """
    try:
        check_sums(folder)
        progress = read_json(folder / PROGRESS, "where a run stands")
    except UserError as error:
        raise UserError(f"{error}\nDelete {folder} to begin anew.") from None
    progress["rows"] = [{key: math.nan if value is None else value for key, value in row.items()} for row in progress["rows"]]
    kept = {name: tree for name, tree in like.items() if name in progress["arrays"]}
    flat = restore_arrays(folder / STATE, _flat(kept))
    return {name: _unflat(name, tree, flat) for name, tree in kept.items()}, progress


def _flat(trees: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{number}": leaf for name, tree in trees.items() for number, leaf in enumerate(jax.tree.leaves(tree))}


def _unflat(name: str, tree: Any, flat: dict[str, Any]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [flat[f"{name}.{number}"] for number in range(len(leaves))])
