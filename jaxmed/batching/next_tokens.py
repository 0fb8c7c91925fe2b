"""What may come next after many texts, summed over groups of them: no array has both a text axis and a vocabulary axis for all texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.batching.batches import Batch
from jaxmed.batching.scoring import passes, scored_stream
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.models.transformer import as_logits, head
from jaxmed.models.vocabulary import log_total
from jaxmed.tokens import TokenizedExample, bucket

AT_ONCE = 32
"""Texts whose logits are held at once."""


def next_token_sums(
    model: Model,
    texts: Sequence[tuple[np.ndarray, np.ndarray]],
    groups: Sequence[int],
    count: int,
    report: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The sum over each group's texts of the log-probabilities of every next token: float64 [groups, V], in nats.

    Args:
        texts: (prompt, what follows it), token ids int [T] and int [R]; what follows may be empty. A prompt that comes several times runs
            once per batch.
        groups: int [texts], 0 to `count` - 1.
        report: called with the number of texts after every batch.
    """
    examples = [TokenizedExample(np.concatenate([prompt, after, [0]]).astype(np.int32), len(prompt)) for prompt, after in texts]
    sums = np.zeros((count, model.config.vocabulary))
    for placed, batch in passes(model, examples):
        size = bucket(len(placed), (AT_ONCE, *(AT_ONCE * 2**at for at in range(1, 12))))
        row, column, group = np.zeros((3, size), np.int32)
        group[:] = count  # what is too much belongs to no group
        for at, place in enumerate(placed):
            row[at], column[at], group[at] = place.row, place.scored.stop - 1, groups[place.example]
        sums += np.asarray(_sums(model.config, model.params, batch, (row, column, group), count), np.float64)
        report(len(placed))
    return sums


@partial(jax.jit, static_argnames=("config", "count"))
def _sums(config: ModelConfig, params: Params, batch: Batch, at: tuple[jax.Array, jax.Array, jax.Array], count: int) -> jax.Array:
    """float32 [groups, V]: sums over the scored places (row, column), each of a group."""
    x = scored_stream(config, params, batch)
    row, column, group = (one.reshape(-1, AT_ONCE) for one in at)

    def add(sums: jax.Array, place: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        logits = as_logits(config, contract("UD,VD->UV", x[place[0], place[1]], head(params)))
        return sums.at[place[2]].add(logits - log_total(logits)[:, None], mode="drop"), None

    return jax.lax.scan(add, jnp.zeros((count, config.vocabulary), jnp.float32), (row, column, group))[0]
