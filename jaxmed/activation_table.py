"""Activations of many prompts as one labelled table, and the direction between two sets of prompts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from jaxmed.cache import Labelled, open_cache, read_cache
from jaxmed.errors import UserError
from jaxmed.files import ArrayLayout
from jaxmed.interventions.sites import SITES, check_sites, site_name
from jaxmed.models.model import Model
from jaxmed.runner.public import forward
from jaxmed.tokens import Prompt, bucket, check_tokens, pad, render
from jaxmed.tokens.columns import columns, differs

DIMS = {"D": "dimension", "N": "head", "K": "kv_head", "H": "head_dimension", "F": "neuron", "S": "key_position"}
"""Letter of a site's axis -> its dimension."""
AT_ONCE = 1 << 28
"""Bytes of activations that one batch may leave on the device, unless one prompt alone leaves more."""
ROWS = 32


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
        out: a folder, which becomes a Zarr group with one file per prompt and site, written batch by batch; the result is read from it as
            it is needed.
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
    job = _make_job(model, prompts, (sites,) if isinstance(sites, str) else tuple(sites), positions, form)
    if out is None:
        _check_memory(job.table.bytes)
        values = {name: np.full(layout.shape, np.nan, np.float32) for name, layout in job.table.arrays.items()}
        for chosen, found in _run(job, np.zeros(len(prompts), bool)):
            for name in values:
                values[name][chosen] = found[name]
        variables = {name: (layout.dims, values[name]) for name, layout in job.table.arrays.items()}
        return xr.Dataset(variables, job.table.coordinates, job.table.attributes)
    asked = positions if isinstance(positions, str) else np.atleast_1d(positions).tolist()
    manifest = {"model": model.record, "mesh": dict(model.mesh.shape), "device": model.mesh.devices.flat[0].device_kind, "form": form}
    manifest |= {"sites": list(job.axes), "positions": asked, "prompts": job.table.coordinates["prompt"]}
    manifest |= {"tokens": [row.tolist() for row in job.rows]}
    with open_cache(Path(out), manifest, job.table, resume) as cache:
        for chosen, found in _run(job, cache.done):
            cache.write(chosen, found)
    return read_cache(Path(out))


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
        if bool(np.isnan(values).any()):
            raise UserError(f"A prompt has no position {int(values.position[0])}: the shortest has {int(values.length.min())} tokens.")
        means.append(values.isel(position=0).mean("prompt", dtype=np.float64))
    found = (means[0] - means[1]).astype(np.float32)
    norm = np.sqrt((found.astype(np.float64) ** 2).sum([dim for dim in found.dims if dim != "layer"]))
    return found.assign_coords(norm=("layer", norm.values)).rename("direction")


@dataclass(frozen=True)
class _Job:
    """A checked request.

    Attributes:
        rows: token ids int [T] of every prompt.
        axes: site, as it was named -> its letters.
        columns: int [prompt, position], counted from the right of a prompt; 0 where it has none.
    """

    model: Model
    rows: list[np.ndarray]
    axes: dict[str, str]
    columns: np.ndarray
    table: Labelled


def _make_job(model: Model, prompts: Sequence[Any], names: tuple[str, ...], positions: Any, form: str) -> _Job:
    axes = {name: SITES[site_name(name)].axes for name in names}
    check_sites(model.config.sizes, map(site_name, names))
    read = [_read(model, prompt, form) for prompt in prompts]
    if not read or not names:
        raise UserError("Give at least one prompt and one site.")
    rows = [one.ids if isinstance(one, Prompt) else one for one in read]
    check_tokens(model.config, rows, "A prompt", model.tokenizer)
    lengths, layers = np.asarray([len(row) for row in rows]), model.config.layers
    asked, places = columns(positions, read, lengths)
    sizes = model.config.sizes | {"S": int(lengths.max())}
    arrays = {}
    for name, letters in axes.items():
        inner = [letter for letter in letters if letter not in "BT"]
        piece = (len(asked), *(sizes[letter] for letter in inner))
        dims = ("prompt", "layer", "position", *(DIMS[letter] for letter in inner))
        arrays[name] = ArrayLayout((len(rows), layers, *piece), (1, 1, *piece), "float32", "NaN", dims, (1, layers, *piece))
    coordinates: dict[str, Any] = {"prompt": _labels(prompts), "layer": np.arange(layers), "position": asked}
    coordinates |= {"length": ("prompt", lengths)}
    if differs(positions):
        coordinates |= {"token_position": (("prompt", "position"), places)}
    if any("S" in letters for letters in axes.values()):
        coordinates |= {DIMS["S"]: np.arange(-sizes["S"], 0)}
    return _Job(model, rows, axes, places, Labelled(arrays, coordinates, {"model": model.name, "form": form}))


def _run(job: _Job, done: np.ndarray) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """(numbers of prompts, site -> float32 [B, L, position, ...]) of every batch of which a prompt is not done."""
    per_token = 4 * job.model.config.layers * sum(math.prod(layout.shape[3:]) for layout in job.table.arrays.values())
    for chosen, length in _batches(np.asarray([len(row) for row in job.rows]), per_token):
        if done[chosen].all():
            continue
        ids, padding = pad([job.rows[number] for number in chosen], length)
        taps = forward(job.model, ids, taps=tuple(job.axes), padding=padding, logits="none")[1]
        found = {}
        for name, letters in job.axes.items():
            out = np.full((len(chosen), *job.table.arrays[name].shape[1:]), np.nan, np.float32)
            _fill(out, taps[name], letters, (job.table.coordinates["position"], job.columns[chosen]), padding)
            found[name] = out
        yield chosen, found


def _read(model: Model, prompt: Any, form: str) -> Prompt | np.ndarray:
    """A prompt with the places of its parts, or token ids int32 [T] as they were given."""
    if isinstance(prompt, (np.ndarray, jax.Array)):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise UserError(f"Token ids of a prompt are int [T], not {prompt.dtype} {list(prompt.shape)}.")
        return np.asarray(prompt, np.int32)
    return render(model, prompt, form=form)


def _labels(prompts: Sequence[Any]) -> list[Any]:
    """Ids of the prompts where all have one of their own, else numbers."""
    names = [getattr(prompt, "id", "") for prompt in prompts]
    return names if all(isinstance(name, str) and name for name in names) and len({*names}) == len(names) else list(range(len(names)))


def _check_memory(size: int) -> None:
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > held:
        raise UserError(f"These activations take {size / 1e9:.1f} GB; this machine has {held / 1e9:.1f}. Ask for fewer sites or positions.")


def _batches(lengths: np.ndarray, per_token: int) -> Iterator[tuple[list[int], int]]:
    """(numbers of prompts, columns): prompts of one bucket of lengths, all batches of a bucket of one size but the last, which repeats."""
    buckets = np.asarray([bucket(int(length)) for length in lengths])
    for size in np.unique(buckets):
        numbers = np.flatnonzero(buckets == size).tolist()
        rows = max(1, min(ROWS, len(numbers), AT_ONCE // max(1, per_token * int(size))))
        for begin in range(0, len(numbers), rows):
            chosen = numbers[begin : begin + rows]
            yield [*chosen, *[chosen[-1]] * (rows - len(chosen))], int(size)


def _fill(out: np.ndarray, tap: jax.Array, axes: str, places: tuple[np.ndarray, np.ndarray], padding: np.ndarray) -> None:
    """Puts activations [L, B, ...] of a batch, padded at the left, into `out` [B, L, position, ...], which holds NaN.

    Args:
        places: the coordinate `position`, and int [B, position]: columns counted from the right, 0 where a prompt has none.
    """
    at = axes.index("T") + 1
    width = tap.shape[at]
    inside = places[0] >= -width
    wanted = places[1][:, inside]
    values = np.moveaxis(np.asarray(jax.vmap(partial(jnp.take, axis=at - 1), (1, 0))(tap, wanted % width), np.float32), at, 2)
    missing = (wanted == 0).reshape(len(wanted), 1, -1, *[1] * (values.ndim - 3))
    if "S" in axes:
        missing = missing | (np.arange(width) < padding[:, None])[:, None, None, None]
        keys = min(width, out.shape[-1])
        out[:, :, inside, ..., -keys:] = np.where(missing, np.nan, values)[..., -keys:]
    else:
        out[:, :, inside] = np.where(missing, np.nan, values)
