"""Log-probabilities of given responses: one example a row, only scored tokens are unembedded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.finetuning.batches import Batch, Shape, batch_layout, make_batch
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.load import Model
from jaxmed.models.transformer import Params, as_logits, final_norm, head
from jaxmed.plan import TOKENS_PER_DEVICE
from jaxmed.runner import run_blocks
from jaxmed.tokens import Answered, bucket

FEWEST = 0.1
"""A bucket of lengths that holds a smaller share of the examples is put into the next one: every bucket is compiled anew."""


@dataclass(frozen=True)
class Group:
    """Examples that run in batches of one shape."""

    members: np.ndarray
    shape: Shape


def group(examples: Sequence[Answered], devices: int, tokens_per_device: int, rows: int = 0) -> list[Group]:
    """Examples by bucket of length; batches have one example per row and as many rows per device as fit.

    Args:
        tokens_per_device: most tokens of a batch on a device (one row may exceed it).
        rows: rows per device, instead.
    """
    sizes = np.asarray([bucket(len(example.ids)) for example in examples])
    legal = sorted(set(sizes.tolist()))
    for small, larger in pairwise(legal):
        if (sizes == small).sum() < FEWEST * len(sizes):
            sizes[sizes == small] = larger
    groups = []
    for size in sorted(set(sizes.tolist())):
        members = np.nonzero(sizes == size)[0]
        scored = bucket(max(len(examples[i].ids) - examples[i].prompt for i in members.tolist()))
        each = rows or max(1, tokens_per_device // size)
        count = devices * min(each, -(-len(members) // devices))
        groups.append(Group(members, Shape(count, 0, 1, int(size), scored)))
    return groups


def count_batches(groups: Sequence[Group]) -> int:
    """How many batches a pass over the groups has."""
    return sum(math.ceil(len(one.members) / one.shape.rows) for one in groups)


def batches(examples: Sequence[Answered], groups: Sequence[Group]) -> Iterator[tuple[np.ndarray, Batch]]:
    """(example numbers, batch) of a pass; the weights of an example's scored tokens add up to one, those of empty rows to zero."""
    for one in groups:
        for at in range(0, len(one.members), one.shape.rows):
            members = one.members[at : at + one.shape.rows]
            batch = make_batch(examples, members, one.shape, False)
            yield members, replace(batch, weight=batch.weight / np.maximum(batch.weight.sum(-1, keepdims=True), 1))


@partial(jax.jit, static_argnames=("config",))
def _score(config: ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every scored token float32 [B,R], and whether it is the likeliest, bool [B,R]."""
    h, _ = run_blocks(config, params, batch.tokens, batch_layout(batch))
    x = final_norm(config, params, jnp.take_along_axis(h, batch.column[..., None], 1))
    logits = as_logits(config, contract("BRD,VD->BRV", x, head(params)))
    own = jnp.take_along_axis(logits, batch.target[..., None], -1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == batch.target


@dataclass(frozen=True)
class Scored:
    """A response under a model.

    Attributes:
        log_probabilities: float32 [R], of every response token after all before it, in nats.
        likeliest: bool [R], whether the token is the most likely one.
    """

    log_probabilities: np.ndarray
    likeliest: np.ndarray


def score_responses(model: Model, examples: Sequence[Answered], report: Callable[[int], None] = lambda done: None) -> list[Scored]:
    """Every example's response under a model, in the examples' order.

    Args:
        report: called with the number of examples after every batch.
    """
    found: list[Scored | None] = [None] * len(examples)
    for members, batch in _placed(model, examples):
        values, likeliest = (np.asarray(x) for x in _score(model.config, model.params, batch))
        for row, at in enumerate(members.tolist()):
            count = len(examples[at].ids) - examples[at].prompt
            found[at] = Scored(values[row, :count], likeliest[row, :count])
        report(len(members))
    return [one for one in found if one is not None]


def _placed(model: Model, examples: Sequence[Answered]) -> Iterator[tuple[np.ndarray, Batch]]:
    """(example numbers, batch on the model's devices) of all examples."""
    device, place = model.mesh.devices.flat[0], jax.NamedSharding(model.mesh, jax.P("data"))
    groups = group(examples, model.mesh.shape["data"], TOKENS_PER_DEVICE.get(device.platform, 2048))
    for members, batch in batches(examples, groups):
        yield members, jax.device_put(batch, place)


@partial(jax.jit, static_argnames=("config",))
def _choose(config: ModelConfig, params: Params, batch: Batch, choices: jax.Array) -> jax.Array:
    """Logits float32 [B,C] of the tokens `choices` int [C] at each row's first scored column."""
    h, _ = run_blocks(config, params, batch.tokens, batch_layout(batch))
    x = final_norm(config, params, jnp.take_along_axis(h, batch.column[:, :1, None], 1)[:, 0])
    return as_logits(config, contract("BD,CD->BC", x, head(params)[choices]))


def choice_logits(
    model: Model, prompts: Sequence[np.ndarray], choices: Sequence[int], report: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Logits of a few tokens after every prompt: float32 [prompts, choices]; no others are unembedded.

    Args:
        prompts: token ids int [T] each.
        report: called with the number of prompts after every batch.
    """
    examples = [Answered(np.append(ids, np.int32(choices[0])), len(ids)) for ids in prompts]
    found = np.zeros((len(prompts), len(choices)), np.float32)
    for members, batch in _placed(model, examples):
        found[members] = np.asarray(_choose(model.config, model.params, batch, np.asarray(choices, np.int32)))[: len(members)]
        report(len(members))
    return found


def example_losses(model: Model, examples: Sequence[Answered]) -> np.ndarray:
    """Mean cross-entropy of every example's response tokens, in nats: float64 [examples]."""
    return np.array([-one.log_probabilities.mean(dtype=np.float64) for one in score_responses(model, examples)])
