"""Activations of many prompts as one labelled table, and the direction between two sets of prompts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr

from jaxmed.errors import UserError, quoted
from jaxmed.interventions.sites import SITES, site_name
from jaxmed.models.model import Model
from jaxmed.runner.public import forward
from jaxmed.tokens import bucket, check_tokens, pad, render

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
) -> xr.Dataset:
    """Activations of prompts of any lengths.

    Prompts run in batches of one bucket of lengths, so there are as many compiled programs as buckets. The result is held in memory:
    4 bytes x prompts x layers x positions x units, for every site. Beside it a batch holds every position of its prompts on the device,
    up to 256 MB (or one prompt's).

    Args:
        prompts: user messages, examples, chats, or token ids int [T].
        sites: one or several, by name or TransformerLens alias.
        positions: "last", "all", or numbers from the right: -1 is the last token of a prompt, its generation header included.
        form: how prompts are written: chat, text, plain, space or qa; see `prompts.forms`.

    Returns:
        A variable per site, float32 [prompt, layer, position, unit...], under the name given: NaN where a prompt is shorter. Coordinates:
        `prompt` (ids of examples, else numbers), `layer`, `position` counted from the right, `length` [prompt] in tokens.

    Raises:
        UserError: no prompts, or one that cannot be read; an unknown site; positions that no prompt has; more than this machine's memory.
    """
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    found = {name: SITES[site_name(name)].axes for name in names}
    rows = [_ids(model, prompt, form) for prompt in prompts]
    if not rows or not names:
        raise UserError("Give at least one prompt and one site.")
    check_tokens(model.config, rows, "A prompt", model.tokenizer)
    lengths = np.asarray([len(row) for row in rows])
    asked = _positions(positions, int(lengths.max()))
    sizes = model.config.sizes | {"S": int(lengths.max())}
    inner = {name: [letter for letter in axes if letter not in "BT"] for name, axes in found.items()}
    shapes = {name: (len(rows), model.config.layers, len(asked), *(sizes[letter] for letter in inner[name])) for name in names}
    _check_memory(4 * sum(math.prod(shape) for shape in shapes.values()))
    out = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    per_token = 4 * model.config.layers * sum(math.prod(sizes[letter] for letter in letters) for letters in inner.values())
    for chosen, length in _batches(lengths, per_token):
        ids, padding = pad([rows[number] for number in chosen], length)
        taps = forward(model, ids, taps=names, padding=padding, logits="none")[1]
        for name, axes in found.items():
            _write(out[name], taps[name], axes, chosen, lengths, asked)
    variables = {name: (("prompt", "layer", "position", *(DIMS[letter] for letter in inner[name])), out[name]) for name in names}
    labels = _labels(prompts)
    coordinates: dict[str, Any] = {"prompt": labels, "layer": np.arange(model.config.layers), "position": asked}
    coordinates |= {"length": ("prompt", lengths)}
    if any("S" in letters for letters in inner.values()):
        coordinates |= {DIMS["S"]: np.arange(-sizes["S"], 0)}
    return xr.Dataset(variables, coordinates, {"model": model.name, "form": form})


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


def _ids(model: Model, prompt: Any, form: str) -> np.ndarray:
    """Token ids of one prompt."""
    if isinstance(prompt, (np.ndarray, jax.Array)):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise UserError(f"Token ids of a prompt are int [T], not {prompt.dtype} {list(prompt.shape)}.")
        return np.asarray(prompt, np.int32)
    return render(model, prompt, form=form).ids


def _labels(prompts: Sequence[Any]) -> list[Any]:
    """Ids of the prompts where all have one of their own, else numbers."""
    names = [getattr(prompt, "id", "") for prompt in prompts]
    return names if all(isinstance(name, str) and name for name in names) and len({*names}) == len(names) else list(range(len(names)))


def _positions(asked: str | int | Sequence[int], longest: int) -> np.ndarray:
    if asked == "all":
        return np.arange(-longest, 0)
    numbers = np.atleast_1d(np.asarray(-1 if asked == "last" else asked))
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.ndim != 1 or not numbers.size or len(np.unique(numbers)) < numbers.size:
        raise UserError(f'positions is {quoted(asked)}; legal: "last", "all", or different whole numbers from the right, such as -1.')
    if (wrong := numbers[(numbers >= 0) | (numbers < -longest)]).size:
        raise UserError(f"No prompt has position {wrong[0]}: positions count from the right, here from -{longest} to -1.")
    return numbers.astype(int)


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


def _write(out: np.ndarray, tap: jax.Array, axes: str, chosen: list[int], lengths: np.ndarray, asked: np.ndarray) -> None:
    """Puts activations [L, B, ...] of a batch, padded at the left, where they belong in `out` [P, L, position, ...]."""
    at = axes.index("T") + 1
    columns = tap.shape[at]
    inside = asked >= -columns
    values = np.moveaxis(np.asarray(tap.take(columns + asked[inside], axis=at), np.float32), at, 2)  # [L, B, position, ...]
    if "S" in axes:
        values = values[..., -out.shape[-1] :]
    for row, number in enumerate(chosen):
        known = asked[inside] >= -lengths[number]
        target = out[number, :, np.flatnonzero(inside)[known]]  # [position, L, ...]
        given = np.moveaxis(values[:, row][:, known], 1, 0)
        if "S" in axes:
            keys = min(int(lengths[number]), given.shape[-1])
            target[..., -keys:] = given[..., -keys:]
            given = target
        out[number, :, np.flatnonzero(inside)[known]] = given
