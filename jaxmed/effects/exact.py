"""The exact engine: one base run and one source run per pair, then every unit as one row of `propagate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.effects.outcomes import Answers, OutcomeName, Readout, Reads, encode_answers, make_reads, next_token, read
from jaxmed.effects.units import UNITS, ModuleUnits, Record, chunk_rows, module_rows, neuron_rows, recorded_sites
from jaxmed.interventions.edits import TokenIndex
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.transformer import Params
from jaxmed.prompts.pair import PromptPair
from jaxmed.runner import Layout, Prefix, Recording, Restart, propagate, run_tokens
from jaxmed.tokens import WINDOW_BUCKETS, Packed, Patch, align, bucket, pack, render


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
class Prepared:
    """A pair ready to be swept.

    Attributes:
        patches: the patches of the asked position.
        packed, answers, start: the base prompt with its answers, and the first column of the widest window.
        base, source: activations at the window's columns; the source's are aligned to the base's columns.
        key, value: [L, S, K, H] of the base run.
        target: float32 [V], the source's next-token log-probabilities, where an outcome needs them.
        base_outcome, source_outcome: float32 [outcome], from full forwards.
        routing_margin: float32 [L], the smallest lead in router logits of the last used expert over the first unused one: in the
            base run from the first patched token on, answers included, and in the source run at the patched tokens. None without experts.
    """

    patches: tuple[Patch, ...]
    packed: Packed
    answers: Answers
    start: int
    base: Record
    source: Record
    key: jax.Array
    value: jax.Array
    target: Any
    base_outcome: np.ndarray
    source_outcome: np.ndarray
    routing_margin: np.ndarray | None


def prepare(
    model: Model, pair: PromptPair, outcomes: tuple[OutcomeName, ...], units: tuple[str, ...], position: str | int, form: str = "chat"
) -> Prepared:
    """Runs base and source once and keeps what every patch needs.

    Raises:
        UserError: what `render`, `align` and `encode_answers` refuse.
    """
    base, source = (render(model.tokenizer, pair, side, form) for side in ("base", "source"))
    patches = tuple(align(base, source, position))
    answers = encode_answers(model.tokenizer, pair, outcomes, form)
    return prepare_tokens(model, base.ids, source.ids, answers, patches, outcomes, units)


def prepare_tokens(
    model: Model,
    base: np.ndarray,
    source: np.ndarray,
    answers: Answers,
    patches: tuple[Patch, ...],
    outcomes: tuple[OutcomeName, ...],
    units: tuple[str, ...],
) -> Prepared:
    """`prepare` for token ids int [T] of base and source."""
    packed, packed_source = pack(base, answers.ids), pack(source, answers.ids)
    config, params, readout = model.config, model.params, Readout(outcomes)
    start = min(patch.base[0] for patch in patches)
    columns, source_columns = _columns(packed, start, patches)
    base_taps, source_taps = recorded_sites(config, units)

    slots = make_reads(packed_source, answers, 0).slots
    there, h = record(config, params, *_fed(packed_source), source_columns, slots, source_taps)
    target = next_token(config, params, h[0]) if "kl" in outcomes else None
    source_outcome = read(config, params, h, make_reads(packed_source, answers, 0, target), readout)

    reads = make_reads(packed, answers, 0, target)
    here, h = record(config, params, *_fed(packed), columns, reads.slots, (*base_taps, *CACHED))
    key, value = (here.pop(name) for name in CACHED)
    base_outcome = read(config, params, h, reads, readout)
    patched = [column - start for patch in patches for column in patch.base]
    margin = _routing_margin(config, here, there, packed.used - start, patched) if config.experts else None
    ends = np.asarray(base_outcome), np.asarray(source_outcome)
    return Prepared(patches, packed, answers, start, here, there, key, value, target, *ends, margin)


def _routing_margin(config: ModelConfig, base: Record, source: Record, used: int, patched: list[int]) -> np.ndarray:
    """By how many logits the last used expert leads the first unused one, at the least over tokens: float32 [L].

    Infinite where tokens use all experts. Takes the router logits [L,T,X] out of the records: no patch needs them.

    Args:
        used: how many columns of the base's record count.
        patched: the columns of the source's record that count.
    """
    sides = np.asarray(base.pop("router_logits"))[:, :used], np.asarray(source.pop("router_logits"))[:, patched]
    ranked = np.insert(np.sort(np.concatenate(sides, axis=1), axis=-1), 0, -np.inf, axis=-1)
    return (ranked[..., -config.experts_used] - ranked[..., -config.experts_used - 1]).min(axis=1)


def _fed(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return packed.tokens, packed.position, packed.visible


def _columns(packed: Packed, start: int, patches: Sequence[Patch]) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the widest window in the base, and the source's columns that go with them (0 where nothing is patched)."""
    size = bucket(packed.used - start, WINDOW_BUCKETS)
    columns = np.minimum(start + np.arange(size), len(packed.tokens) - 1).astype(np.int32)
    from_base = {b: s for patch in patches for b, s in zip(patch.base, patch.source, strict=True)}
    return columns, np.asarray([from_base.get(start + i, 0) for i in range(size)], np.int32)


@dataclass(frozen=True)
class Window:
    """One patch of a prepared pair, as the arguments of `propagate`."""

    restart: Restart
    reads: Reads
    slots: np.ndarray
    patched: np.ndarray


def open_window(prepared: Prepared, patch: Patch) -> Window:
    """The window from a patch's first token to the last answer token, padded to a bucket."""
    packed, start = prepared.packed, patch.base[0]
    size = bucket(packed.used - start, WINDOW_BUCKETS)
    offset = start + np.arange(size)
    columns = np.minimum(offset, len(packed.tokens) - 1)
    used = offset < packed.used
    visible = packed.visible[np.ix_(columns, columns)] & used & used[:, None] | np.eye(size, dtype=bool)
    before = np.arange(prepared.key.shape[1])
    prefix = Prefix(prepared.key[:, None], prepared.value[:, None], before[None].astype(np.int32), (before < start)[None])
    index = TokenIndex(offset[None].astype(np.int32), np.asarray([len(packed.tokens)], np.int32))
    restart = Restart(prefix, Layout(packed.position[columns][None], visible[None], index))
    recorded = next(iter(prepared.base.values())).shape[1]
    slots = np.minimum(offset - prepared.start, recorded - 1).astype(np.int32)
    reads = make_reads(packed, prepared.answers, start, prepared.target)
    return Window(restart, reads, slots, np.isin(offset, patch.base))


@dataclass(frozen=True)
class Values:
    """Outcomes of the rows of some chunks, still on their devices.

    Attributes:
        units: int [chunks, devices, rows], the unit of each row; -1 for base rows.
        outcome: per chunk, float32 [outcome, devices * rows].
    """

    units: np.ndarray
    outcome: list[jax.Array]

    def effects(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Effects of units 0 to count - 1 and the base outcomes they were taken from, both float32 [outcome, count].

        Every row is compared with the base row of its own device and chunk: a difference of like with like. NaN where a unit
        has no row.
        """
        rows = np.concatenate([np.asarray(x).reshape(len(x), *self.units.shape[1:]) for x in self.outcome], axis=1)
        units = self.units.reshape(-1, self.units.shape[-1])
        base = np.broadcast_to(rows[..., :1], rows.shape)
        swept = units >= 0
        found = np.full((2, len(rows), count), np.nan, np.float32)
        found[0][:, units[swept]] = (rows - base)[:, swept]
        found[1][:, units[swept]] = base[:, swept]
        return found[0], found[1]


def _place(model: Model, rows: np.ndarray) -> jax.Array:
    return jax.device_put(rows, jax.NamedSharding(model.mesh, jax.P("data")))


def neuron_values(
    model: Model, prepared: Prepared, window: Window, layer: int, units: int, width: int, per_device: int, readout: Readout
) -> Values:
    """Outcomes of all `units` windows of `width` neurons of one layer (width 1: single neurons)."""
    config, params = model.config, model.params
    chunks = chunk_rows(units, per_device, model.mesh.shape["data"])
    outcome = []
    for chunk in chunks:
        numbers = _place(model, chunk.reshape(-1))
        at = (np.int32(layer), window.slots, window.patched)
        h = neuron_rows(config, params, prepared.base, prepared.source, *at, numbers, width)
        outcome.append(propagate(config, params, window.restart, h, np.int32(layer + 1), window.reads, readout))
    return Values(chunks, outcome)


def module_values(
    model: Model, prepared: Prepared, window: Window, kinds: tuple[str, ...], layers: Sequence[int], per_device: int, readout: Readout
) -> tuple[Values, list[tuple[str, int, int]]]:
    """Outcomes of whole modules and heads of the given layers; units are numbered as in the list of (kind, layer, index)."""
    config, params = model.config, model.params
    named = module_units(config, kinds)
    wanted = np.asarray([layer in set(layers) for _, layer, _ in named])
    outcome, kept = [], []
    for chunk in chunk_rows(len(named), per_device, model.mesh.shape["data"]):
        first = named[int(chunk[chunk >= 0].min())][1]
        chunk = np.where((chunk >= 0) & wanted[np.maximum(chunk, 0)], chunk, -1)  # finished layers keep their rows, at base
        if (chunk < 0).all():
            continue
        kept.append(chunk)
        units = jax.tree.map(lambda x: _place(model, x), _module_chunk(named, chunk.reshape(-1), kinds, first))
        entry = module_rows(config, params, prepared.base, prepared.source, window.slots, window.patched, units, kinds)
        outcome.append(propagate(config, params, window.restart, entry.stream, np.int32(first), window.reads, readout, entry))
    return Values(np.stack(kept), outcome), named


def module_units(config: ModelConfig, kinds: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """(kind, layer, index) of every module unit, by layer, so that a chunk restarts as late as it can."""
    count = lambda kind: config.sizes[UNITS[kind].axis] if UNITS[kind].axis else 1  # noqa: E731
    return [(kind, layer, index) for layer in range(config.layers) for kind in kinds for index in range(count(kind))]


def _module_chunk(named: list[tuple[str, int, int]], numbers: np.ndarray, kinds: tuple[str, ...], first: int) -> ModuleUnits:
    rows = [(kinds.index(named[n][0]), named[n][1], named[n][2]) if n >= 0 else (-1, first, 0) for n in numbers]
    return ModuleUnits(*(np.asarray(column, np.int32) for column in zip(*rows, strict=True)))
