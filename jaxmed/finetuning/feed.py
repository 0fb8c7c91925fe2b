"""Batches on their devices; where the lowest blocks have no adapters, with the residual stream that those give, once per example."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np

from jaxmed.axes import row_sharding
from jaxmed.batching.batches import Batch, batch_layout
from jaxmed.finetuning.job import Job
from jaxmed.models.config import ModelConfig
from jaxmed.models.params import Params
from jaxmed.runner import run_tokens


class Feed:
    """The batches of a job.

    What the blocks below the first adapted one give is the same in every epoch. It is computed in the batches of the first epoch,
    whichever step asks for it, so that a resumed run goes on with the same bits; a job that `keeps` it holds it on the host.
    """

    def __init__(self, job: Job):
        self.job, self.first = job, job.settings.first_layer
        self._below = jax.jit(partial(_below, job.model.config, self.first))
        self._kept: dict[int, np.ndarray] = {}
        self._trunk: np.ndarray | None = None
        self._steps = {int(i): step for step in reversed(range(min(job.steps, job.steps_per_epoch))) for i in job.order[step]}

    def batch(self, step: int) -> Batch:
        """The batches [A, ...] of a step."""
        batch = self.job.batch(step)
        if not self.first:
            return self._put(batch)
        if not self.job.keeps:
            return self._through(self._put(batch))
        return self._put(replace(batch, h=self._from_kept(step, batch)))

    def heldout(self) -> list[Batch]:
        """The held-out examples, in their order."""
        batches = [jax.tree.map(lambda leaf: leaf[None], batch) for batch in self.job.heldout_batches()]
        placed = [self._through(self._put(batch)) if self.first else self._put(batch) for batch in batches]
        return [jax.tree.map(lambda leaf: leaf[0], batch) for batch in placed]

    def _put(self, batch: Batch) -> Batch:
        return jax.device_put(batch, row_sharding(self.job.model.mesh, 1))

    def _through(self, batch: Batch) -> Batch:
        return replace(batch, h=self._below(self.job.model.params, batch))

    def _from_kept(self, step: int, batch: Batch) -> np.ndarray:
        for i in self.job.order[step]:
            if int(i) not in self._kept:
                self._keep(self._steps[int(i)])
        if self._trunk is None:
            self._keep(0)
        h = np.zeros((*batch.tokens.shape, self.job.model.config.width), np.float32)
        h[:, :, : batch.trunk] = self._trunk
        for part, place in self.job.places(step):
            own = self._kept[place.example]
            h[part, place.row, place.begin : place.begin + len(own)] = own
        return h

    def _keep(self, step: int) -> None:
        batch = self._through(self._put(self.job.batch(step)))
        h = np.asarray(batch.h)
        if step == 0:
            self._trunk = h[0, 0, : batch.trunk].copy()
        for part, place in self.job.places(step):
            length = len(self.job.examples[place.example].ids) - batch.trunk
            self._kept[place.example] = h[part, place.row, place.begin : place.begin + length].copy()


def _below(config: ModelConfig, first: int, params: Params, batches: Batch) -> jax.Array:
    """The residual stream [A,B,T,D] that enters block `first`."""
    lower = {**params, "blocks": jax.tree.map(lambda stack: stack[:first], params["blocks"])}
    return jax.lax.map(lambda batch: run_tokens(config, lower, batch.tokens, batch_layout(batch)).stream, batches)
