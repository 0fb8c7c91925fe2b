"""The exact engine: one base run and one source run per contrast, then every unit as one row of a restarted run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_parts, row_sharding, vocabulary_parts
from jaxmed.effects.contrast import Contrast
from jaxmed.effects.mediators import MEDIATORS, Unit, patched_rows, recorded_sites, written
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.readout import Readout, Reads, make_reads, next_token, read
from jaxmed.effects.rows import Picks, Record, View
from jaxmed.hosts import to_host
from jaxmed.interventions.edits import TokenIndex
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.runner import Entry, Layout, Prefix, Recording, Restart, lies_by_layer, propagate, propagate_by_layer, run_tokens
from jaxmed.tokens import WINDOW_BUCKETS, PackedPrompt, Patch, bucket


@partial(jax.jit, static_argnames=("config", "taps"))
def record(config: ModelConfig, params: Params, tokens: Any, position: Any, visible: Any, columns: Any, slots: Any, taps: tuple[str, ...]):
    """One run of a packed prompt int [T]: taps at `columns` ([L, W, ...]; cached keys and values whole) and h at `slots`."""
    index = TokenIndex(jnp.arange(tokens.shape[0])[None], jnp.asarray([tokens.shape[0]]))
    layout = Layout(position[None], visible[None], index)
    recording = Recording(tuple(name for name in taps if name not in CACHED), CACHED[0] in taps)
    ran = run_tokens(config, params, tokens[None], layout, recording, columns=columns[None])
    taken = ran.taps if ran.kept is None else {**ran.taps, **dict(zip(CACHED, ran.kept, strict=True))}
    return {name: values[:, 0] for name, values in taken.items()}, ran.stream[0, slots]


CACHED = ("cached_key", "cached_value")


@dataclass(frozen=True)
class PreparedContrast:
    """A contrast ready to be swept.

    Attributes:
        packed, start: the base prompt with its answers, and the first column of the widest window.
        base, source: activations at the window's columns; the source's are aligned to the base's columns.
        key, value: [L, S, K, H] of the base run.
        target: float32 [V], the source's next-token log-probabilities, where an outcome needs them.
        base_outcome, source_outcome: float32 [outcome], from full forwards.
        routing_margin: float32 [L], the smallest gap between the router logits of the last used expert and the first unused one, over the
            base run's tokens from the first patched one on (answers included) and the source run's patched tokens. None without experts.
    """

    contrast: Contrast
    packed: PackedPrompt
    start: int
    base: Record
    source: Record
    key: jax.Array
    value: jax.Array
    target: Any
    base_outcome: np.ndarray
    source_outcome: np.ndarray
    routing_margin: np.ndarray | None


def prepare(contrast: Contrast, outcomes: tuple[OutcomeName, ...], units: tuple[str, ...], stream: bool = False) -> PreparedContrast:
    """Runs base and source once and keeps what every patch needs; with `stream`, the base run's input of every layer too."""
    model, other, answers, patches = contrast.base.model, contrast.source.model, contrast.answers, contrast.patches
    config, params, readout = model.config, model.params, Readout(outcomes, vocabulary_parts(model.mesh))
    packed, packed_source = contrast.packed(), contrast.packed(contrast.source)
    start = min(patch.base[0] for patch in patches)
    columns, source_columns = _columns(packed, start, patches)
    base_taps, source_taps = recorded_sites(config, units, stream)

    slots = make_reads(packed_source, answers, 0).slots
    there, h = record(other.config, other.params, *_fed(packed_source), source_columns, slots, source_taps)
    target = next_token(other.config, other.params, h[0]) if readout.needs_source else None
    source_outcome = read(other.config, other.params, h, make_reads(packed_source, answers, 0, target), readout)

    reads = make_reads(packed, answers, 0, target)
    here, h = record(config, params, *_fed(packed), columns, reads.slots, (*base_taps, *CACHED))
    key, value = (here.pop(name) for name in CACHED)
    base_outcome = read(config, params, h, reads, readout)
    patched = [column - start for patch in patches for column in patch.base]
    margin = routing_margin(config, here, there, packed.used - start, patched) if config.experts else None
    ends = to_host(base_outcome), to_host(source_outcome)
    return PreparedContrast(contrast, packed, start, here, there, key, value, target, *ends, margin)


def source_values(contrast: Contrast, units: tuple[str, ...]) -> Record:
    """The source run's values [L, P, ...] at all tokens that the contrast patches."""
    source, packed = contrast.source, contrast.packed(contrast.source)
    columns = np.asarray(sorted({column for patch in contrast.patches for column in patch.source}), np.int32)
    taps = tuple(site for site in recorded_sites(source.model.config, units)[1] if site != "router_logits")
    return record(source.model.config, source.model.params, *_fed(packed), columns, columns[:1], taps)[0]


def routing_margin(config: ModelConfig, base: Record, source: Record, used: int, patched: list[int]) -> np.ndarray:
    """By how many logits the last used expert leads the first unused one, at the least over tokens: float32 [L].

    Infinite where tokens use all experts. Takes the router logits [L,T,X] out of the records: no patch needs them.

    Args:
        used: how many columns of the base's record count.
        patched: the columns of the source's record that count.
    """
    sides = to_host(base.pop("router_logits"))[:, :used], to_host(source.pop("router_logits"))[:, patched]
    ranked = np.insert(np.sort(np.concatenate(sides, axis=1), axis=-1), 0, -np.inf, axis=-1)
    return (ranked[..., -config.experts_used] - ranked[..., -config.experts_used - 1]).min(axis=1)


def _fed(packed: PackedPrompt) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return packed.tokens, packed.position, packed.visible


def _columns(packed: PackedPrompt, start: int, patches: Sequence[Patch]) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the widest window in the base, and the source's columns that go with them (0 where nothing is patched)."""
    size = bucket(packed.used - start, WINDOW_BUCKETS)
    columns = np.minimum(start + np.arange(size), len(packed.tokens) - 1).astype(np.int32)
    from_base = {b: s for patch in patches for b, s in zip(patch.base, patch.source, strict=True)}
    return columns, np.asarray([from_base.get(start + i, 0) for i in range(size)], np.int32)


@dataclass(frozen=True)
class Window:
    """Patches of a prepared contrast, mostly one, as the arguments of restarted runs."""

    restart: Restart
    reads: Reads
    view: View

    @property
    def size(self) -> int:
        """Tokens that every row carries."""
        return self.view.slots.shape[0]


def open_window(prepared: PreparedContrast, *patches: Patch) -> Window:
    """The window from the first patched token to the last answer token, padded to a bucket; rows of several patches can share one."""
    packed, start = prepared.packed, min(patch.base[0] for patch in patches)
    size = bucket(packed.used - start, WINDOW_BUCKETS)
    offset = start + np.arange(size, dtype=np.int32)
    columns = np.minimum(offset, len(packed.tokens) - 1)
    used = offset < packed.used
    visible = packed.visible[np.ix_(columns, columns)] & used & used[:, None] | np.eye(size, dtype=bool)
    before = np.arange(prepared.key.shape[1], dtype=np.int32)[None]
    prefix = Prefix(prepared.key[:, None], prepared.value[:, None], before, before < start)
    index = TokenIndex(offset[None], np.asarray([len(packed.tokens)], np.int32))
    recorded = next(iter(prepared.base.values())).shape[1]
    slots = np.minimum(offset - prepared.start, recorded - 1).astype(np.int32)
    reads = make_reads(packed, prepared.contrast.answers, start, prepared.target)
    view = View(prepared.base, prepared.source, slots, np.stack([np.isin(offset, patch.base) for patch in patches]))
    return Window(Restart(prefix, Layout(packed.position[columns][None], visible[None], index)), reads, view)


@dataclass(frozen=True)
class Values:
    """Outcomes of the rows of some chunks, still on their devices.

    Attributes:
        units: int [chunks, devices, rows], the number of each row's unit; -1 for base rows.
        outcome: per chunk, float32 [outcome, devices * rows].
    """

    units: np.ndarray
    outcome: list[jax.Array]

    @property
    def passes(self) -> int:
        """Rows that were run."""
        return self.units.size

    def effects(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Effects of units 0 to count - 1 and the base outcomes they were taken from, both float32 [outcome, count].

        Every row is compared with the base row of its own device and chunk: a difference of like with like. NaN where a unit
        has no row.
        """
        rows = np.concatenate([to_host(x).reshape(len(x), *self.units.shape[1:]) for x in self.outcome], axis=1)
        units = self.units.reshape(-1, self.units.shape[-1])
        base = np.broadcast_to(rows[..., :1], rows.shape)
        swept = units >= 0
        found = np.full((2, len(rows), count), np.nan, np.float32)
        found[0][:, units[swept]] = (rows - base)[:, swept]
        found[1][:, units[swept]] = base[:, swept]
        return found[0], found[1]


def chunk_rows(units: int, per_device: int, devices: int) -> np.ndarray:
    """Unit numbers of every row, int [chunks, devices, 1 + per_device]; -1 is the base, which leads every device's share."""
    chunks = -(-units // (per_device * devices))
    padded = np.full(chunks * per_device * devices, -1, np.int32)
    padded[:units] = np.arange(units)
    rows = padded.reshape(chunks, devices, per_device)
    return np.concatenate([np.full((chunks, devices, 1), -1, np.int32), rows], axis=2)


def unit_values(
    model: Model,
    window: Window,
    units: Sequence[Unit],
    width: int,
    per_device: int,
    readout: Readout,
    way: str = "whole",
    patches: np.ndarray | None = None,
) -> Values:
    """Outcomes of units of any kinds and layers, in the order of their layers: every chunk restarts as late as its first one allows.

    Returns before they are finished.

    Args:
        patches: int [units], which of the window's patches each one has, where it has several.
        width: neurons of a window.
        per_device: rows of a chunk on each device, beside the base row.
        way: what of the model responds; see `estimands.Pass`.
    """
    kinds = tuple(dict.fromkeys(kind for kind, _, _ in units))
    picks = np.asarray([(kinds.index(kind), layer, index) for kind, layer, index in units], np.int32)
    picks = picks if patches is None else np.column_stack([picks, patches]).astype(np.int32)
    chunks = chunk_rows(len(units), per_device, row_parts(model.mesh))
    run = partial(_chunk_outcome, model, window, picks, kinds=kinds, width=width, readout=readout, way=way)
    return Values(chunks, [run(chunk.reshape(-1)) for chunk in chunks])


def _chunk_outcome(
    model: Model, window: Window, picks: np.ndarray, chunk: np.ndarray, kinds: tuple[str, ...], width: int, readout: Readout, way: str
) -> jax.Array:
    """Outcomes float32 [outcome, rows] of one chunk; rows int [rows] number the picks [units, 3 or 4], -1 stays at base."""
    config, params = model.config, model.params
    own = picks[np.maximum(chunk, 0)]
    first, last = (int(of(picks[chunk[chunk >= 0], 1])) for of in (np.min, np.max))
    kind, layer, index = np.where(chunk >= 0, own[:, 0], -1), np.where(chunk >= 0, own[:, 1], first), own[:, 2:]
    placed = jax.device_put(Picks(kind, layer, *index.T), row_sharding(model.mesh))
    rows, mid = patched_rows(config, params, window.view, placed, kinds, width)
    propagates = propagate_by_layer if lies_by_layer(params) else propagate
    run = partial(propagates, config, params, window.restart, reads=window.reads, readout=readout, asked=window.reads.slots)
    vectors = None if way == "whole" else _vectors(window.view, placed, rows, mid)
    if way == "to-logits":
        return run(_last_streams(window.view, vectors), np.int32(config.layers))
    if first == last and not any(MEDIATORS[name].mid for name in kinds):  # all rows begin behind the same layer
        return run(rows, np.int32(first + 1), minus=vectors)
    behind = np.asarray([MEDIATORS[name].by_layer for name in kinds])[own[:, 0]]
    begin = np.min((own[:, 1] + behind)[chunk >= 0])
    return run(rows, np.int32(begin), entry=Entry(rows, placed.layer, mid), minus=vectors)


_vectors = jax.jit(written)


@jax.jit
def _last_streams(view: View, vectors: jax.Array) -> jax.Array:
    """The base run's last residual stream with every row's vector added: [U,T,D]."""
    last = view.base["residual_out"]
    return view.at(view.base, "residual_out", jnp.full(len(vectors), len(last) - 1)) + vectors
