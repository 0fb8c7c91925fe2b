"""Text from a model: one program reads a batch of prompts, another writes token by token from the key/value cache.

Interventions are arguments here too: an edit may act on the prompts' tokens, on the written ones, or on both, and entries that
name a row of the batch act on that row alone, so that a hundred interventions run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.interventions.checks import Extent, check_edits
from jaxmed.interventions.edits import Edit, TokenIndex
from jaxmed.interventions.writing import split_edits
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.transformer import Params
from jaxmed.prompts.examples import Example
from jaxmed.runner import Layout, Prefix, Recording, causal_layout, extend, logits_of, run_tokens
from jaxmed.tokens import bucket, check_tokens, end_tokens, has_text, render, written_text

WHERE = ("both", "prompt", "generated")
ROWS = 64
"""Prompts that are answered at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        keys: random keys [B], one per row, so that a row's text does not depend on its batch.
        temperature, top_p: float.
    """

    keys: Any
    temperature: Any
    top_p: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written:
    """Texts while they are written.

    Attributes:
        token: int [B], the newest token of every text.
        prefix: keys and values of everything before it, with room for what comes: [L, B, S + room, K, H].
        padding: int [B], columns of padding at the left of every prompt.
        length: int, columns of the prompts.
        step: int, how many tokens have been written before the newest.
    """

    token: Any
    prefix: Prefix
    padding: Any
    length: Any
    step: Any


@partial(jax.jit, static_argnames=("config", "room", "sampled"))
def read_prompts(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    padding: jax.Array,
    edits: dict[str, Edit],
    sampling: Sampling,
    room: int,
    sampled: bool,
) -> Written:
    """Prompts int [B,S], padded at the left by `padding` int [B] -> the beginning of their texts, with room for `room` tokens."""
    rows, length = tokens.shape
    ran = run_tokens(config, params, tokens, causal_layout(rows, length, padding), Recording(keep=True), edits=edits)
    assert ran.kept is not None
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))) for x in ran.kept)
    columns = jnp.arange(length + room)
    prefix = Prefix(key, value, columns - padding[:, None], (columns < length) & (columns >= padding[:, None]))
    token = _choose(config, params, ran.stream[:, -1], jnp.int32(0), sampling, sampled)
    return Written(token, prefix, padding, jnp.int32(length), jnp.int32(0))


@partial(jax.jit, static_argnames=("config", "sampled"), donate_argnames=("written",))
def write_token(
    config: ModelConfig, params: Params, written: Written, edits: dict[str, Edit], sampling: Sampling, sampled: bool
) -> Written:
    """The texts with one more token each.

    One call a token, and no loop over tokens inside: with caches carried by a `while` loop, XLA on the CPU (jaxlib 0.10) read
    stale keys and values on two devices from eight rows each on.
    """
    column = written.length + written.step
    position = (column - written.padding)[:, None]
    layout = Layout(position, jnp.ones((1, 1, 1), bool), TokenIndex(position, written.length - written.padding))
    ran = extend(config, params, written.token[:, None], layout, written.prefix, Recording(keep=True), edits=edits)
    assert ran.kept is not None
    held = written.prefix
    key, value = (jax.lax.dynamic_update_slice_in_dim(x, new, column, 2) for x, new in zip((held.key, held.value), ran.kept, strict=True))
    prefix = Prefix(key, value, held.position, held.seen | (jnp.arange(held.seen.shape[1]) == column))
    token = _choose(config, params, ran.stream[:, -1], written.step + 1, sampling, sampled)
    return Written(token, prefix, written.padding, written.length, written.step + 1)


def _choose(config: ModelConfig, params: Params, h: jax.Array, step: jax.Array, sampling: Sampling, sampled: bool) -> jax.Array:
    """The next token [B] after residual streams [B,D]."""
    logits = logits_of(config, params, h)
    if not sampled:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _nucleus(logits / sampling.temperature, sampling.top_p)
    draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)  # noqa: E731
    return jax.vmap(draw)(sampling.keys, logits).astype(jnp.int32)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B,V] of the fewest tokens whose probabilities reach `top_p`; the others are minus infinity (Holtzman et al. 2020)."""
    order = jnp.argsort(-logits, axis=-1)
    share = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), axis=-1)
    kept = jnp.cumsum(share, axis=-1) - share < top_p
    mask = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    return jnp.where(mask, logits, -jnp.inf)


def stop_tokens(model: Model) -> list[int]:
    """Tokens that end an answer of this model."""
    return end_tokens(model.tokenizer, model.generation_config, model.source_config)


def generate_ids(
    model: Model,
    prompts: Sequence[Any],
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    edits: Mapping[str, Edit] | None = None,
    where: str = "both",
    stops: Sequence[int] | None = None,
    stop_texts: Sequence[str] = (),
    rows: int = ROWS,
    report: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Continues prompts of any lengths.

    Args:
        prompts: token ids int [T] each.
        max_tokens: tokens written at most.
        temperature: 0 takes the most likely token; above, tokens are sampled.
        top_p: sample among the fewest tokens whose probabilities reach this.
        edits: site -> `Edit`; entries may name a row, which is the number of a prompt, and position="current", which is every token
            as it is written; other positions count from a prompt's beginning, or with where="prompt" from its end. Dense fields have no
            token axis but one of length 1.
        where: the tokens that edits act on: "both", "prompt", "generated".
        stops: tokens that end a text; default: those of the tokenizer and config.
        stop_texts: nothing more is written once one of these has been; they are left in.
        rows: prompts at once; with edits all prompts run at once.
        report: called with the number of prompts after every batch.

    Returns:
        The written token ids of every prompt, without the token that ended it.

    Raises:
        UserError: no prompts, or an empty one; values out of range; an edit that cannot act here; too many tokens for the model.
    """
    config = model.config
    prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("There is no prompt to continue." if not prompts else "A prompt has no tokens.")
    if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"Tokens ({max_tokens}) are at least 1, temperature ({temperature}) is not negative, top_p ({top_p}) is in (0, 1].")
    if where not in WHERE:
        raise unknown("where", where, WHERE)
    check_tokens(config, prompts, "A prompt", model.tokenizer)
    if (longest := max(map(len, prompts))) + max_tokens > config.max_length:
        raise UserError(f"A prompt of {longest} tokens and {max_tokens} more exceed what this model takes: {config.max_length}.")
    checked = _check(model, edits)
    halves = split_edits(checked, where, [len(prompt) for prompt in prompts], max_tokens)
    ends = np.asarray(stop_tokens(model) if stops is None else stops, np.int32)
    devices = model.mesh.shape["data"]
    size = len(prompts) if checked else min(rows, len(prompts))
    size = -(-size // devices) * devices
    order = range(len(prompts)) if checked else sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    written: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    place = lambda x: jax.device_put(x, jax.NamedSharding(model.mesh, jax.P("data")))  # noqa: E731
    for at in range(0, len(prompts), size):
        chosen = list(order[at : at + size])
        length = bucket(max(len(prompts[i]) for i in chosen))
        tokens, padding = np.zeros((size, length), np.int32), np.full(size, length - 1, np.int32)
        for row, i in enumerate(chosen):
            tokens[row, length - len(prompts[i]) :] = prompts[i]
            padding[row] = length - len(prompts[i])
        numbers = np.asarray([*chosen, *[0] * (size - len(chosen))])
        sampling = Sampling(place(keys[numbers]), np.float32(temperature or 1.0), np.float32(top_p))
        out = _write(model, place(tokens), place(padding), len(chosen), ends, stop_texts, sampling, halves, max_tokens, temperature > 0)
        for row, i in enumerate(chosen):
            written[i] = out[row]
        report(len(chosen))
    return written


def generate(model: Model, prompts: Sequence[str | Example], max_tokens: int = 64, form: str = "chat", **how: Any) -> list[str]:
    """Continues prompts as texts: each is a user message, rendered with the chat template or another `form`.

    An example's `prefill` opens the answer; what is returned goes on from there.

    Args:
        max_tokens: tokens written at most.
        form: how prompts are written: chat, text (which goes straight on), plain, space or qa; see `prompts.forms`.
        how: temperature, top_p, seed, edits, where, stops, stop_texts (left out of the text), rows, report; see `generate_ids`.

    Raises:
        UserError: no tokenizer or chat template; what `generate_ids` raises.
    """
    examples = [Example(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    asked = [render(model.tokenizer, one, form=form) for one in examples]
    written = generate_ids(model, [one.ids for one in asked], max_tokens, **how)
    texts = [written_text(model.tokenizer, one, ids) for one, ids in zip(asked, written, strict=True)]
    return [cut_at(text, how.get("stop_texts", ())) for text in texts]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops` in it."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def _write(
    model: Model,
    tokens: Any,
    padding: Any,
    count: int,
    ends: np.ndarray,
    stop_texts: Sequence[str],
    sampling: Sampling,
    halves: Any,
    max_tokens: int,
    sampled: bool,
) -> list[np.ndarray]:
    """The texts of the first `count` rows of one batch; it ends when all of them have ended."""
    config, params = model.config, model.params
    written = read_prompts(config, params, tokens, padding, halves[0], sampling, max_tokens, sampled)
    columns, stopped, last = [np.asarray(written.token)[:count]], np.full(count, max_tokens), np.asarray(tokens[:, -1])

    def alive() -> bool:
        """Whether a row goes on, after noting the rows that end with the newest token."""
        stopped[np.isin(columns[-1], ends) & (stopped == max_tokens)] = len(columns) - 1
        for row in np.nonzero(stopped == max_tokens)[0] if stop_texts else ():
            if has_text(model.tokenizer, last[row], [column[row] for column in columns], stop_texts):
                stopped[row] = len(columns)
        return bool((stopped == max_tokens).any())

    while alive() and len(columns) < max_tokens:
        written = write_token(config, params, written, halves[1], sampling, sampled)
        columns.append(np.asarray(written.token)[:count])
    return [row[:end] for row, end in zip(np.stack(columns, axis=1), stopped, strict=True)]


def _check(model: Model, edits: Mapping[str, Edit] | None) -> dict[str, Edit]:
    checked = check_edits(edits, Extent(model.config.layers, model.config.sizes | {"S": 1, "T": 1}))
    if "attention_pattern" in checked:
        raise UserError("Attention patterns cannot be edited while text is written: they grow with it. Use `forward`.")
    return checked
