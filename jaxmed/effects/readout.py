"""Outcomes of a run as a function of its last residual stream; part of the compiled program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import hold_rows
from jaxmed.effects.outcomes import OUTCOMES, Answers, OutcomeName
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.params import Params
from jaxmed.models.rules import EXACT, Rules
from jaxmed.models.transformer import as_logits, final_norm, head
from jaxmed.runner import logits_of
from jaxmed.tokens import PackedPrompt, bucket

READ_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
VOCABULARY_BYTES = 48e6
"""Logits of one vocabulary block may take this much memory while the log-normaliser is summed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reads:
    """What a readout reads of a run; padded, so that pairs share a program.

    Attributes:
        slots: int, window slots whose logits are read; the first is the last prompt token.
        at: int [R], index into `slots` for each answer token.
        token: int [R], the answer tokens.
        weight: float32 [outcome, R]; 0 where an outcome does not read the token.
        source: float32 [V], log-probabilities of the source's next token (for "kl"; else [0]).
    """

    slots: Any
    at: Any
    token: Any
    weight: Any
    source: Any


def read_columns(packed: PackedPrompt) -> list[int]:
    """Columns of a packed prompt whose logits outcomes read."""
    return sorted({column for reader in packed.readers for column in reader} | {packed.prompt - 1})


def make_reads(packed: PackedPrompt, answers: Answers, start: int, source: Any = None) -> Reads:
    """The reads of a packed prompt, for a window that begins at column `start`."""
    columns = read_columns(packed)
    at, token, weight = [], [], []
    for number, (answer, reader) in enumerate(zip(answers.ids, packed.readers, strict=True)):
        at += [columns.index(column) for column in reader]
        token += list(answer)
        weight += [[row[number] for row in answers.weights]] * len(answer)
    slots = np.full(bucket(len(columns), READ_BUCKETS), columns[0] - start, np.int32)
    slots[: len(columns)] = np.asarray(columns) - start
    count, size = len(token), bucket(max(len(token), 1), READ_BUCKETS)
    padded = np.zeros((len(answers.weights), size), np.float32)
    padded[:, :count] = np.asarray(weight, np.float32).reshape(count, len(padded)).T
    pad = lambda values: np.asarray(values + [0] * (size - count), np.int32)  # noqa: E731
    return Reads(slots, pad(at), pad(token), padded, np.zeros(0, np.float32) if source is None else source)


@dataclass(frozen=True)
class Readout:
    """The outcomes of a sweep as a function of the last residual stream; hashable, so it can be part of a program.

    Attributes:
        parts: over how many devices the unembedding's rows are split (`vocabulary_parts`). Each device sums over its own.
        rules: what gradients of the final norm flow through.
    """

    outcomes: tuple[OutcomeName, ...]
    parts: int
    rules: Rules = EXACT

    @property
    def needs_source(self) -> bool:
        """Whether an outcome compares the run with the source's next-token distribution."""
        return any(not callable(name) and OUTCOMES[name].needs_source for name in self.outcomes)

    def __call__(self, config: ModelConfig, params: Params, h: jax.Array, reads: Reads) -> jax.Array:
        """h float32 [U,R,D] at `reads.slots` -> outcomes float32 [outcome, U]."""
        x = final_norm(config, params, h, self.rules)
        known = [OUTCOMES[o] for o in self.outcomes if not callable(o)]
        logits = as_logits(config, contract("UTD,RD->URT", x, head(params)[hold_rows(config.mesh, reads.token, ())]))
        logits = jnp.take_along_axis(logits, reads.at[None, :, None], axis=2)[..., 0]
        scores = logits
        normaliser = expected = jnp.zeros(x.shape[:2])
        if any(outcome.normalised for outcome in known):
            normaliser, expected = _normalise(config, x, head(params), reads.source, self.parts)
            scores = logits - normaliser[:, reads.at]
        values = []
        for row, outcome in enumerate(self.outcomes):
            if callable(outcome):
                values.append(jax.vmap(outcome)(as_logits(config, contract("UD,VD->UV", x[:, 0], head(params)))))
            else:
                kind = OUTCOMES[outcome]
                values.append(RULES[kind.rule](scores if kind.normalised else logits, reads.weight[row][None], reads, normaliser, expected))
        return jnp.stack(values).astype(jnp.float32)


def _sum(scores: jax.Array, weight: jax.Array, *rest: Any) -> jax.Array:
    return jnp.sum(scores * weight, axis=-1)


def _total(scores: jax.Array, weight: jax.Array, *rest: Any) -> jax.Array:
    return jax.nn.logsumexp(jnp.where(weight > 0, scores, -jnp.inf), axis=-1)


def _odds(scores: jax.Array, weight: jax.Array, *rest: Any) -> jax.Array:
    return _total(scores, weight) - _total(scores, -weight)


def _kl(scores: jax.Array, weight: jax.Array, reads: Reads, normaliser: jax.Array, expected: jax.Array) -> jax.Array:
    """Minus KL(source || run) at the last prompt token."""
    entropy = -jnp.sum(jnp.exp(reads.source) * reads.source)
    return entropy + expected[:, 0] - normaliser[:, 0]


RULES: dict[str, Callable[..., jax.Array]] = {"sum": _sum, "odds": _odds, "total": _total, "kl": _kl}


def _normalise(config: ModelConfig, x: jax.Array, table: jax.Array, source: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Log-normaliser of the logits, and their mean under the source's distribution, both [U,T]; in blocks of the vocabulary.

    A block takes some rows of every one of the `parts` of the table, so that no row leaves its device: the loop has no collectives, and
    behind it the devices add up one number per token each.
    """
    count, width = table.shape[0] // parts, table.shape[1]
    size = int(min(count, max(128, VOCABULARY_BYTES // (4 * x.shape[0] * x.shape[1]))))
    size = -(-count // -(-count // size))
    table = table.reshape(parts, count, width)
    source = source.reshape(parts, -1)

    def step(number: jax.Array, carry: Any) -> Any:
        top, total, expected = carry
        start = jnp.minimum(number * size, count - size)
        block = jax.lax.dynamic_slice_in_dim(table, start, size, 1).reshape(parts * size, width)
        logits = as_logits(config, contract("UTD,VD->UTV", x, block))
        apart = logits.reshape(*x.shape[:2], parts, size)
        new = (start + jnp.arange(size)) >= number * size  # the last block may reach back over the one before
        masked = jnp.where(new, apart, -jnp.inf)
        higher = jnp.maximum(top, masked.max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(masked - higher[..., None]).sum(-1)
        if source.shape[1]:
            chance = jnp.where(new, jnp.exp(jax.lax.dynamic_slice_in_dim(source, start, size, 1)), 0.0)
            expected = expected + (apart * chance[None, None]).sum(-1)
        return higher, total, expected

    zero = jnp.zeros((*x.shape[:2], parts), jnp.float32)
    top, total, expected = jax.lax.fori_loop(0, -(-count // size), step, (zero - jnp.inf, zero, zero))
    return jax.nn.logsumexp(top + jnp.log(total), axis=-1), expected.sum(-1)


@partial(jax.jit, static_argnames=("config",))
def next_token(config: ModelConfig, params: Params, h: jax.Array) -> jax.Array:
    """Log-probabilities float32 [V] of the next token, from the last residual stream [D] of a token."""
    return jax.nn.log_softmax(logits_of(config, params, h))


@partial(jax.jit, static_argnames=("config", "readout"))
def read(config: ModelConfig, params: Params, h: jax.Array, reads: Reads, readout: Readout) -> jax.Array:
    """Outcomes [outcome] of one run whose last residual stream at `reads.slots` is h [T,D]."""
    return readout(config, params, h[None], reads)[:, 0]
