"""The reference of a mean patch that `jaxmed cache write` kept: means over any prompts, read instead of computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxmed.cache.folders import Held, read_held
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.reference import Reference
from jaxmed.errors import NOT_FINITE, UserError
from jaxmed.files.arrays import open_checked, reason
from jaxmed.files.chunk_sums import ChunkSums
from jaxmed.interventions.sites import site_name
from jaxmed.models.model import Model


def check_stored(folder: str, units: Sequence[str]) -> Held:
    """The folder, if it holds every site that units of these kinds swap, of all its prompts.

    Raises:
        UserError: no activations there; sites that are missing; prompts that are not written yet.
    """
    held = read_held(Path(folder))
    missing = sorted(_sites(units) - {site_name(name) for name in held.arrays})
    if missing:
        raise UserError(f"--reference {folder} lacks the sites {', '.join(missing)}. Write them with `jaxmed cache write --sites`.")
    if not held.done.all():
        left = int((~held.done).sum())
        raise UserError(f"--reference {folder}: {left:,} prompts are not written yet. Finish it with `jaxmed cache write --resume`.")
    return held


def stored_digest(folder: str) -> str:
    """SHA-256 of what a folder's means are of: model, tokens, positions and form, wherever the folder lies."""
    manifest = read_held(Path(folder)).manifest
    facts = [manifest.get("model", {}).get("weights"), *(manifest.get(key) for key in ("tokens", "positions", "form"))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def stored_reference(folder: str, model: Model, units: Sequence[str]) -> Reference:
    """Means of a folder at the sites of these kinds of units: every prompt weighs the same, and within it every token that was kept.

    Raises:
        UserError: what `check_stored` raises; activations of other weights; what is damaged.
    """
    held = check_stored(folder, units)
    weights = held.manifest.get("model", {}).get("weights")
    if weights != model.identity:
        raise UserError(
            f"--reference {folder} is of other weights ({str(weights)[:12]}) than {model.name} ({model.identity[:12]}). "
            "Write it anew with this model."
        )
    wanted = _sites(units)
    means = {site_name(name): _mean(held, name) for name in held.arrays if site_name(name) in wanted}
    return Reference({"source": means}, {})


def _sites(units: Sequence[str]) -> set[str]:
    return {site for unit in units for site in MEDIATORS[unit].sites}


def _mean(held: Held, name: str) -> jnp.ndarray:
    """Mean [L, ...] of a site, read shard by shard; summed in float64."""
    array, total, count = open_checked(held.folder / name, str(held.folder / name)), 0.0, 0
    sums = ChunkSums(held.folder)
    for begin in range(0, len(held.done), held.shard):
        place = (slice(begin, min(begin + held.shard, len(held.done))),)
        try:
            read = array[place].read().result()
            why = sums.problem(name, array, place, read)
        except (ValueError, OSError) as error:
            read, why = None, reason(error)
        if why:
            fix = "`jaxmed cache verify` says what else is, and `jaxmed cache write --resume` mends it."
            raise UserError(f"--reference {held.folder}, {name}: {why}. {fix}")
        values = np.asarray(read, np.float64)  # [prompt, L, position, ...]
        known = np.isfinite(values).reshape(*values.shape[:3], -1)
        kept = np.all(known, axis=(1, 3))  # [prompt, position]
        some = np.any(kept, axis=1)
        if np.any(np.any(known, axis=(1, 3)) & ~kept):  # where a prompt has no token, nothing is known
            raise UserError(f"--reference {held.folder}: activations at {name} are not all finite, so they have no mean. {NOT_FINITE}")
        weight = kept[some] / np.sum(kept[some], axis=1, keepdims=True)
        total = total + np.einsum("pt,plt...->l...", weight, np.nan_to_num(values[some]))
        count += int(some.sum())
    return jnp.asarray(np.asarray(total) / max(count, 1), jnp.float32)
