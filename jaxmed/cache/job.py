"""Which activations of which prompts are wanted, and what they take, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmed.cache.store import Labelled
from jaxmed.errors import UserError
from jaxmed.files import ArrayLayout
from jaxmed.interventions.sites import SITES, check_sites, site_name
from jaxmed.models.model import Model
from jaxmed.runs.cost import Cost, propagate_flops
from jaxmed.tokens import Prompt, bucket, check_several, check_tokens, render
from jaxmed.tokens.columns import columns, differs

DIMS = {"D": "dimension", "N": "head", "K": "kv_head", "H": "head_dimension", "F": "neuron", "S": "key_position"}
"""Letter of a site's axis -> its dimension."""
SHARD_BYTES, CHUNK_BYTES = 1 << 26, 1 << 18
"""Bytes of the prompts that are computed, held and written together, all sites of them; and of what is read alone, at least."""


@dataclass(frozen=True)
class Job:
    """A checked request.

    Attributes:
        rows: token ids int [T] of every prompt.
        axes: site, as it was named -> its letters.
        columns: int [prompt, position], counted from the right of a prompt; 0 where it has none.
        asked: the positions as they were given.
        shard: prompts that are computed, held and written together.
    """

    model: Model
    rows: list[np.ndarray]
    axes: dict[str, str]
    columns: np.ndarray
    table: Labelled
    asked: Any
    shard: int

    @property
    def manifest(self) -> dict[str, Any]:
        """All that decides a number or a label, with the prompts' token ids under "tokens"."""
        model = self.model
        found = {"model": model.record, "mesh": dict(model.mesh.shape), "device": model.mesh.devices.flat[0].device_kind}
        found |= {"form": self.table.attributes["form"], "sites": list(self.axes), "positions": self.asked}
        return found | {"prompts": self.table.coordinates["prompt"], "tokens": [row.tolist() for row in self.rows]}

    def cost(self, done: np.ndarray | None = None) -> Cost:
        """Forwards of all prompts, or of those that are not `done` (bool [prompt]), each alone; the head is not run."""
        config = self.model.config
        rows = [row for number, row in enumerate(self.rows) if done is None or not done[number]]
        flops = sum(propagate_flops(config, 1, len(row), 0, config.layers) for row in rows)
        written = self.table.bytes * len(rows) // len(self.rows)
        return Cost("activations", flops, len(rows), written=written, programs=len({bucket(len(row)) for row in rows}))


def make_job(model: Model, prompts: Sequence[Any], names: tuple[str, ...], positions: Any, form: str) -> Job:
    """Reads, tokenises and checks; see `table.activations` for what is refused."""
    axes = {name: SITES[site_name(name)].axes for name in names}
    check_sites(model.config.sizes, map(site_name, names))
    check_several(prompts)
    read = [_read(model, prompt, form) for prompt in prompts]
    if not read or not names:
        raise UserError("Give at least one prompt and one site.")
    rows = [one.ids if isinstance(one, Prompt) else one for one in read]
    check_tokens(model.config, rows, "A prompt", model.tokenizer)
    lengths = np.asarray([len(row) for row in rows])
    asked, places = columns(positions, read, lengths)
    sizes = model.config.sizes | {"S": int(lengths.max())}
    coordinates: dict[str, Any] = {"prompt": _labels(prompts), "layer": np.arange(model.config.layers), "position": asked}
    coordinates |= {"length": ("prompt", lengths)}
    if differs(positions):
        coordinates |= {"token_position": (("prompt", "position"), places)}
    if any("S" in letters for letters in axes.values()):
        coordinates |= {DIMS["S"]: np.arange(-sizes["S"], 0)}
    inner = {name: [letter for letter in letters if letter not in "BT"] for name, letters in axes.items()}
    pieces = {name: (len(asked), *(sizes[letter] for letter in letters)) for name, letters in inner.items()}
    dims = {name: ("prompt", "layer", "position", *(DIMS[letter] for letter in letters)) for name, letters in inner.items()}
    whole = (len(rows), model.config.layers)
    shard = prompts_of_a_shard(4 * whole[1] * sum(map(math.prod, pieces.values())), whole[0])
    arrays = {name: _layout(whole, piece, dims[name], shard) for name, piece in pieces.items()}
    table = Labelled(arrays, coordinates, {"model": model.name, "form": form})
    return Job(model, rows, axes, places, table, positions if isinstance(positions, str) else np.atleast_1d(positions).tolist(), shard)


def prompts_of_a_shard(each: int, count: int) -> int:
    """How many prompts are written together: a power of two, so that chunks divide it, or all.

    Args:
        each: bytes of a prompt's activations.
        count: prompts in all.
    """
    return min(count, 1 << max(0, (SHARD_BYTES // max(1, each)).bit_length() - 1))


def _layout(whole: tuple[int, int], piece: tuple[int, ...], dims: tuple[str, ...], shard: int) -> ArrayLayout:
    """Shards of some prompts and all layers; chunks of one layer, and of as many prompts as make them worth a read."""
    together = min(shard, 1 << max(0, (CHUNK_BYTES // (4 * math.prod(piece))).bit_length() - 1))
    together = together if shard % together == 0 else shard
    shape, chunks = (*whole, *piece), (together, 1, *piece)
    return ArrayLayout(shape, chunks, "float32", "NaN", dims, (shard, whole[1], *piece), compress=False)


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
