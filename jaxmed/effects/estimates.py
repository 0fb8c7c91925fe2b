"""The estimators of first order: all units of some pairs from two forwards and one backward of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from jaxmed.axes import row_parts, row_sharding, vocabulary_parts
from jaxmed.effects.engine import PreparedContrast, routing_margin
from jaxmed.effects.estimands import variable
from jaxmed.effects.first_order import Base, estimate, narrow, run_base, run_source, sites_of
from jaxmed.effects.grad_drop import GRADDROP
from jaxmed.effects.job import Job
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.pair_batches import PairRows, batch_rows, batches_of, shape_of, window_of, with_target
from jaxmed.effects.patches import with_patch
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Record
from jaxmed.effects.work import Chunk, Item, OpenPair, Work, ends, in_table
from jaxmed.hosts import to_host
from jaxmed.models.rules import Rules
from jaxmed.runs.cost import backward_flops, propagate_flops


@dataclass(frozen=True)
class FirstOrder:
    """Change times gradient, for every unit at once; `rules` say what gradients flow through, `drops` whether they are repeated without
    each layer."""

    rules: Rules
    drops: bool = False

    def items(self, job: Job) -> list[Item]:
        """Batches of pairs of one shape, all layers."""
        return [Item(numbers, job.layers) for numbers in batches_of(job.contrasts, job.chunk)]

    def work(self, job: Job, item: Item) -> Work:
        """Two forwards and a backward of every row, rows that fill the batch included. Layers of an item take their part of it each."""
        shape, config = shape_of(job.contrasts[item.pairs[0]]), job.model.config
        rows, outcomes, seen = rows_of(job, item), len(job.request.outcomes), shape.length if shape.window < shape.length else 0
        flops = sum(propagate_flops(config, rows, length, 0, config.layers) for length in (shape.length, shape.source_length))
        backward = partial(backward_flops, config, rows, shape.window, seen)
        flops += backward(config.layers - job.layers[0], outcomes * self.backwards(job))
        part = len(item.layers) / len(job.layers)
        each = sum(len(job.contrasts[pair].patches) for pair in item.pairs) * outcomes * job.count(job.request.units)
        return Work(round((2 + outcomes * self.backwards(job)) * rows * part), flops * part, each * len(item.layers))

    def backwards(self, job: Job) -> int:
        """Of a row and outcome."""
        return job.model.config.layers - job.layers[0] if self.drops else 1

    def shared(self, job: Job, pair: int) -> float:
        """Nothing: an item takes all that its pairs take."""
        del job, pair
        return 0.0

    def open(self, job: Job, pairs: tuple[int, ...]) -> OpenPair | None:
        """Nothing."""
        del job, pairs

    def start(self, job: Job, item: Item, opened: OpenPair | None) -> Callable[[], list[Chunk]]:
        """Dispatches the forwards and the backward."""
        del opened
        sites = sites_of(job.request.units)
        ran = run_pairs(job, item, self.readout(job), sites, narrow(sites))
        found, first = self.effects(job, item, ran), job.layers[0]
        return lambda: [*ran.ends(job, item), *_chunks(job, item, found, first)]

    def readout(self, job: Job) -> Readout:
        """The outcomes, linearised by the rules."""
        return Readout(job.request.outcomes, vocabulary_parts(job.model.mesh), self.rules)

    def effects(self, job: Job, item: Item, ran: RanPairs) -> Record:
        """Effects of all units of the job's layers, from its first one on: unit -> float32 [L, O, B, P, count]."""
        del item
        return ran.effects(job, self.rules, self.drops)


@dataclass(frozen=True)
class RanPairs:
    """The base and source runs of a batch of pairs.

    Attributes:
        written: sites [L, B, W, ...], what the patch writes in the place of base's values.
        source_outcome: float32 [O, B].
        routed: router logits of base and source, [L, B, W, X]; None without experts.
    """

    pairs: PairRows
    base: Base
    written: Record
    source_outcome: jax.Array
    routed: tuple[jax.Array, jax.Array] | None

    def effects(self, job: Job, rules: Rules, drops: bool = False) -> Record:
        """First-order effects of all units of the job's layers: unit -> float32 [L, O, B, P, count], from its first layer on."""
        model, request = job.contrasts[0].base.model, job.request
        sites, how = (
            {site: self.written[site] for site in sites_of(request.units)},
            (request.units, request.window, rules, job.layers[0], drops),
        )
        return estimate(model.config, model.params, self.pairs, self.base, sites, *how)

    def ends(self, job: Job, item: Item) -> list[Chunk]:
        """Outcomes of base and source of every pair, and how near routing is to a tie."""
        base, source = map(to_host, (self.base.outcome, self.source_outcome))
        chunks: list[Chunk] = []
        for row, pair in enumerate(item.pairs):
            margin, contrast = None, job.contrasts[pair]
            if self.routed is not None:
                start, first = window_of(contrast)[0], min(patch.base[0] for patch in contrast.patches)
                patched = [column - start for patch in contrast.patches for column in patch.base]
                here, there = ({"router_logits": side[:, row]} for side in self.routed)
                here = {name: values[:, first - start :] for name, values in here.items()}
                margin = routing_margin(job.model.config, here, there, contrast.packed().used - first, patched)
            chunks += ends(job, pair, base[:, row], source[:, row], margin)
        return chunks


def run_pairs(job: Job, item: Item, readout: Readout, source_sites: tuple[str, ...], base_sites: tuple[str, ...]) -> RanPairs:
    """Runs both sides of an item's pairs, and keeps these sites of them; of the base those too that a patch may need."""
    contrasts = [job.contrasts[pair] for pair in item.pairs]
    model, other = contrasts[0].base.model, contrasts[0].source.model
    pairs = jax.device_put(batch_rows(contrasts, rows_of(job, item)), row_sharding(model.mesh))
    routed = ("router_logits",) if model.config.experts else ()
    base_taps = {*routed, *base_sites, *(() if job.request.patch == "resample" else source_sites)} - {"residual_in"}
    there, source_outcome, target = run_source(other.config, other.params, pairs, tuple(sorted({*routed, *source_sites})), readout)
    pairs = with_target(pairs, target)
    base = run_base(model.config, model.params, pairs, tuple(sorted(base_taps)), readout)
    written = {site: there[site] for site in source_sites if site not in routed}
    if job.request.patch != "resample":
        written = _written(job, item, pairs, base, written)
    return RanPairs(pairs, base, written, source_outcome, (base.record["router_logits"], there["router_logits"]) if routed else None)


def rows_of(job: Job, item: Item) -> int:
    """Rows of an item's programs: those of a whole batch, a multiple of the devices."""
    devices = row_parts(job.model.mesh)
    return -(-job.chunk[shape_of(job.contrasts[item.pairs[0]]).key] // devices) * devices


def _written(job: Job, item: Item, pairs: PairRows, base: Base, there: Record) -> Record:
    """What the patch writes at the sites, pair by pair: [L,B,W,...]."""
    nothing, own = np.zeros(0, np.float32), []
    for row, pair in enumerate(item.pairs):
        contrast = job.contrasts[pair]
        base_record, source = ({site: side[site][:, row] for site in there} for side in (base.record, there))
        start, _ = window_of(contrast)
        runs = PreparedContrast(contrast, contrast.packed(), start, base_record, source, base.key, base.value, None, nothing, nothing, None)
        own.append(with_patch(runs, job.request.patching, job.reference).source)
    own += [own[-1]] * (pairs.start.shape[0] - len(own))
    return {site: jax.numpy.stack([one[site] for one in own], axis=1) for site in there}


def _chunks(job: Job, item: Item, found: Record, first: int) -> list[Chunk]:
    """The item's effects, as the table has them."""
    chunks: list[Chunk] = []
    for name, effects in found.items():
        unit = name.removesuffix(f"_{GRADDROP}")
        values = np.moveaxis(to_host(effects), 2, 0)  # [B, L, O, P, U]
        for row, pair in enumerate(item.pairs):
            of_pair = np.swapaxes(values[row][:, :, : len(job.contrasts[pair].patches)], -1, -2)  # [L, O, U, P]
            of_pair = of_pair if MEDIATORS[unit].axis else of_pair[:, :, 0]
            chunks += [
                (variable(name, "indirect"), {"pair": pair, "layer": layer}, in_table(job, of_pair[layer - first])) for layer in item.layers
            ]
    return chunks
