"""Activations of many prompts as one labelled table, and the direction between two sets of prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed.cache.job import Job, make_job
from jaxmed.cache.run import open_shards, run_shards
from jaxmed.cache.store import open_cache, read_cache
from jaxmed.errors import NOT_FINITE, UserError
from jaxmed.hosts import own_part
from jaxmed.models.model import Model
from jaxmed.runs.watch import RESUMED, Watch, silent


def activations(
    model: Model,
    prompts: Sequence[Any],
    sites: str | Sequence[str] = "residual_out",
    positions: str | int | Sequence[int] = "last",
    form: str = "chat",
    out: str | Path | None = None,
    resume: bool = False,
) -> xr.Dataset:
    """Activations of prompts of any lengths.

    Prompts run in batches of one bucket of lengths, so there are as many compiled programs as buckets. Without `out` the result is held in
    memory: 4 bytes x prompts x layers x positions x units, for every site. Beside it a batch holds every position of its prompts on the
    device, up to 256 MB (or one prompt's), and what was asked of it in memory.

    Args:
        prompts: user messages, examples, chats, or token ids int [T].
        sites: one or several, by name or TransformerLens alias.
        positions: "last"; "all" (or "each"); numbers from the right: -1 is the last token of a prompt, its generation header included;
            "user_last", "user" or "header"; or a substring, its first place in the user's message, or else in the whole prompt.
        form: how prompts are written: chat, text, plain, space or qa; see `prompts.forms`.
        out: a folder, which becomes a Zarr group, written shard by shard (about 64 MB) while the next one is computed; the result is read
            from it as it is needed.
        resume: go on with what `out` holds.

    Returns:
        A variable per site, float32 [prompt, layer, position, unit...], under the name given: NaN where a prompt is shorter. Coordinates:
        `prompt` (ids of examples, else numbers), `layer`, `position` counted from the right, `length` [prompt] in tokens. Where positions
        are a word or a substring, `position` counts its tokens from the right, and `token_position` [prompt, position] says where each
        stands in its prompt, from the right too; 0 where a prompt has fewer.

    Raises:
        UserError: no prompts, or one that cannot be read; an unknown site; positions that no prompt has, or a word that one of them lacks;
            more than this machine's memory, or than the disk of `out` has room for; an `out` that holds something else, a run without
            `resume`, or one of another request.
    """
    job = make_job(model, prompts, (sites,) if isinstance(sites, str) else tuple(sites), positions, form)
    if out is not None:
        return write_activations(job, Path(out), resume)
    _check_memory(job.table.bytes)
    values = {name: np.full(layout.shape, np.nan, np.float32) for name, layout in job.table.arrays.items()}
    for chosen, found in run_shards(job, open_shards(len(prompts), job.shard, np.zeros(len(prompts), bool))):
        for name in values:
            values[name][chosen] = found[name]
    variables = {name: (layout.dims, values[name]) for name, layout in job.table.arrays.items()}
    return xr.Dataset(variables, job.table.coordinates, job.table.attributes)


def write_activations(job: Job, out: Path, resume: bool = False, report: Watch = silent) -> xr.Dataset:
    """Fills, or goes on with, a folder of activations; returns them, lazily read. While a shard is written the next one is computed.

    Args:
        report: told of every shard, in tokens and prompts.

    Raises:
        UserError: an `out` that holds something else, a run without `resume`, or one of another request; no room on its disk.
    """
    lengths = np.asarray([len(row) for row in job.rows])
    with open_cache(out, job.manifest, job.table, resume) as cache:
        if cache.done.any():
            report(float(lengths[cache.done].sum()), 0, RESUMED)
        for chosen, found in run_shards(job, own_part(open_shards(len(job.rows), cache.shard, cache.done))):
            cache.write(chosen, found)
            report(float(lengths[list(chosen)].sum()), len(chosen), "")
        cache.finish()
    return read_cache(out)


def mean_difference(
    model: Model,
    prompts_a: Sequence[Any],
    prompts_b: Sequence[Any],
    site: str = "residual_out",
    position: str | int = "last",
    form: str = "chat",
) -> xr.DataArray:
    """The direction from the mean activation of prompts b to that of prompts a: mean(a) - mean(b).

    Args:
        site, position, form: see `activations`; one position.

    Returns:
        float32 [layer, unit...], with the coordinate `norm` [layer], the direction's length.

    Raises:
        UserError: what `activations` raises; several positions; a prompt that lacks the position.
    """
    means = []
    for prompts in (prompts_a, prompts_b):
        values = activations(model, prompts, site, position, form)[site]
        if values.sizes["position"] != 1:
            raise UserError(f"A direction is read at one position, not at {values.sizes['position']}. Give one, such as -1.")
        if int(values.length.min()) < -int(values.position[0]):
            raise UserError(f"A prompt has no position {int(values.position[0])}: the shortest has {int(values.length.min())} tokens.")
        if "key_position" in values.dims and len({*values.length.values.tolist()}) > 1:
            raise UserError(f"{site} of prompts of different lengths has no mean. Give prompts of one length, or another site.")
        if not bool(np.isfinite(values).all()):
            raise UserError(f"Activations at {site} are not all finite, so they have no mean. {NOT_FINITE}")
        means.append(values.isel(position=0).mean("prompt", dtype=np.float64))
    found = (means[0] - means[1]).astype(np.float32)
    norm = np.sqrt((found.astype(np.float64) ** 2).sum([dim for dim in found.dims if dim != "layer"]))
    return found.assign_coords(norm=("layer", norm.values)).rename("direction")


def _check_memory(size: int) -> None:
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > held:
        raise UserError(f"These activations take {size / 1e9:.1f} GB; this machine has {held / 1e9:.1f}. Ask for fewer sites or positions.")
