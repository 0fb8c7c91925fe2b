"""Log-probabilities of given responses: examples packed into rows, only scored tokens are unembedded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_parts, row_sharding
from jaxmed.batching.answered import by_prompt
from jaxmed.batching.batches import Batch, Place, batch_layout, choose_shape, common_beginning, make_batch, places
from jaxmed.errors import UserError
from jaxmed.interventions.checks import Extent, check_edits
from jaxmed.interventions.edits import ANY, Edit
from jaxmed.interventions.sites import SITES
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.models.transformer import as_logits, final_norm, head
from jaxmed.models.vocabulary import largest, log_total
from jaxmed.runner import run_tokens
from jaxmed.runs.cost import TOKENS_PER_DEVICE
from jaxmed.tokens import TokenizedExample, check_tokens

SHORT = 256
"""Examples up to this many tokens share batches; beyond, those between a power of two and the next."""
PIECE = 512
"""Most scored tokens of a row whose logits are held at once."""


def passes(model: Model, examples: Sequence[TokenizedExample]) -> Iterator[tuple[list[Place], Batch]]:
    """(places whose `example` counts in `examples`, batch on the model's devices) of all examples.

    Examples of like lengths have batches of one shape; what all begin with runs once per row, and the prompt of several once.
    """
    check_tokens(model.config, (example.ids for example in examples), "An example", model.tokenizer)
    devices, device = row_parts(model.mesh), model.mesh.devices.flat[0]
    most, where = TOKENS_PER_DEVICE.get(device.platform, 2048), row_sharding(model.mesh)
    lengths = np.asarray([len(example.ids) for example in examples])
    classes = np.maximum(np.ceil(np.log2(np.maximum(lengths, 1) / SHORT)), 0)
    for one in sorted(set(classes.tolist())):
        items = by_prompt(examples, np.nonzero(classes == one)[0].tolist(), int(SHORT * 2 ** (one + 1)))
        alone = [(examples[i], [i]) for i in np.nonzero(classes == one)[0].tolist()]
        if len(items) < 2 * devices and _longest_share(alone, devices) < _longest_share(items, devices):
            items = alone  # some devices would have too little to do
        items.sort(key=lambda item: -len(item[0].ids))
        held = [item for item, _ in items]
        trunk = common_beginning(held) // 8 * 8 if len(held) > devices else 0  # else every length would be compiled anew
        count = -(-sum(len(item.ids) - trunk for item in held) // (devices * max(most - trunk, most // 2)))
        count = max(1, min(count, -(-len(held) // devices)))
        groups = [np.arange(len(held))[at::count] for at in range(count)]
        shape = choose_shape(held, groups, True, devices, model.config, trunk)
        for group in groups:
            found = [own for place in places(held, group, shape, True) for own in _apart(examples, place, items[place.example][1])]
            yield found, jax.device_put(make_batch(held, group, shape, True), where)


def _longest_share(items: Sequence[tuple[TokenizedExample, list[int]]], devices: int) -> int:
    """At least so many tokens has the device that has most to do."""
    lengths = [len(item.ids) for item, _ in items]
    return max(*lengths, -(-sum(lengths) // devices)) if len(lengths) > 1 else lengths[0]


def _apart(examples: Sequence[TokenizedExample], place: Place, members: Sequence[int]) -> Iterator[Place]:
    """Where each of the examples lies that one stands for: their scored tokens follow each other."""
    begin = place.scored.start
    for number in members:
        stop = begin + len(examples[number].ids) - examples[number].prompt
        yield replace(place, example=number, scored=slice(begin, stop))
        begin = stop


def scored_stream(config: ModelConfig, params: Params, batch: Batch, edits: Mapping[str, Edit] | None = None) -> jax.Array:
    """The normed residual stream at every scored column [B,R,D]."""
    h = run_tokens(config, params, batch.tokens, batch_layout(batch), edits=edits).stream
    return final_norm(config, params, jnp.take_along_axis(h, batch.column[..., None], 1))


@partial(jax.jit, static_argnames=("config",))
def _score(config: ModelConfig, params: Params, batch: Batch, edits: Mapping[str, Edit] | None = None) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every scored token float32 [B,R], and whether none is likelier, bool [B,R]."""
    x, scored = scored_stream(config, params, batch, edits), batch.target.shape[1]
    size = -(-scored // -(-scored // PIECE))
    rest = -scored % size
    x, target = jnp.pad(x, ((0, 0), (0, rest), (0, 0))), jnp.pad(batch.target, ((0, 0), (0, rest)))

    def piece(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        here, wanted = (jax.lax.dynamic_slice_in_dim(whole, at, size, 1) for whole in (x, target))
        logits = as_logits(config, contract("BRD,VD->BRV", here, head(params)))
        own = jnp.take_along_axis(logits, wanted[..., None], -1)[..., 0]
        return own - log_total(logits), own >= largest(logits)

    found = jax.lax.map(piece, jnp.arange(0, target.shape[1], size))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(len(x), -1), found)


@dataclass(frozen=True)
class ResponseScore:
    """A response under a model.

    Attributes:
        log_probabilities: float32 [R], of every response token after all before it, in nats.
        likeliest: bool [R], whether no token is more likely.
    """

    log_probabilities: np.ndarray
    likeliest: np.ndarray


def score_responses(
    model: Model,
    examples: Sequence[TokenizedExample],
    report: Callable[[int], None] = lambda done: None,
    edits: Mapping[str, Edit] | None = None,
) -> list[ResponseScore]:
    """Every example's response under a model, in the examples' order.

    Args:
        report: called with the number of examples after every batch.
        edits: interventions at every token of every example.

    Raises:
        UserError: edits that name a position or a row: examples share rows.
    """
    found: dict[int, ResponseScore] = {}
    checked = check_everywhere(model, edits) if edits else None
    for placed, batch in passes(model, examples):
        values, likeliest = (np.asarray(x) for x in _score(model.config, model.params, batch, checked))
        found |= {p.example: ResponseScore(values[p.row, p.scored], likeliest[p.row, p.scored]) for p in placed}
        report(len(placed))
    return [found[at] for at in range(len(examples))]


def check_everywhere(model: Model, edits: Mapping[str, Edit]) -> dict[str, Edit]:
    """The edits, checked; needs the config, not the weights.

    Raises:
        UserError: edits that the model cannot take, or that do not act on every token alike.
    """
    checked = check_edits(edits, Extent(model.config.layers, model.config.sizes | {"S": 1, "T": 1}))
    for site, edit in checked.items():
        if "S" in SITES[site].axes:
            raise UserError(f"The edit at {site!r} acts on pairs of tokens; responses that are scored share rows. Edit another site.")
        if not _acts_everywhere(edit):
            raise UserError(f"The edit at {site!r} names positions or rows; responses are scored with edits of every token alone.")
    return checked


def _acts_everywhere(edit: Edit) -> bool:
    """Whether an edit is the same at every token: entries that name neither row nor position, or dense fields with one of each."""
    if edit.where is not None:
        return all((np.asarray(getattr(edit.where, name)) == ANY).all() for name in ("position", "row"))
    shapes = (np.shape(given) for given in (edit.gate, edit.value, edit.add))  # a scalar, or [L, B, T, ...]
    return edit.tokens is None and all(shape[1:3] in ((), (1, 1)) for shape in shapes)


@partial(jax.jit, static_argnames=("config",))
def _choose(config: ModelConfig, params: Params, batch: Batch, choices: jax.Array) -> jax.Array:
    """Logits float32 [B,R,C] of the tokens `choices` int [C] at every scored column."""
    return as_logits(config, contract("BRD,CD->BRC", scored_stream(config, params, batch), head(params)[choices]))


def choice_logits(
    model: Model, prompts: Sequence[np.ndarray], choices: Sequence[int], report: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Logits of a few tokens after every prompt: float32 [prompts, choices]; no others are unembedded.

    Args:
        prompts: token ids int [T] each.
        report: called with the number of prompts after every batch.
    """
    examples = [TokenizedExample(np.append(ids, np.int32(choices[0])), len(ids)) for ids in prompts]
    found = np.zeros((len(prompts), len(choices)), np.float32)
    for placed, batch in passes(model, examples):
        values = np.asarray(_choose(model.config, model.params, batch, np.asarray(choices, np.int32)))
        for p in placed:
            found[p.example] = values[p.row, p.scored.start]
        report(len(placed))
    return found


def example_losses(model: Model, examples: Sequence[TokenizedExample]) -> np.ndarray:
    """Mean cross-entropy of every example's response tokens, in nats: float64 [examples]."""
    return np.array([-one.log_probabilities.mean(dtype=np.float64) for one in score_responses(model, examples)])
