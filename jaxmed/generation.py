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
from jaxmed.interventions.edits import Edit, TokenIndex, apply_edit, check_edits
from jaxmed.interventions.sites import SITES
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import MASKED, attention_scores, contract
from jaxmed.models.model import Model
from jaxmed.models.rope import layer_windows, model_angles
from jaxmed.models.transformer import Params, as_logits, embed, final_norm, head, open_block
from jaxmed.prompts.examples import Example
from jaxmed.runner import causal_layout, run_blocks
from jaxmed.tokens import bucket, check_tokens, render, written_text

WHERE = ("both", "prompt", "generated")
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_role|>", "</s>")
"""Tokens that end an assistant's turn, where a vocabulary has them."""
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


@partial(jax.jit, static_argnames=("config", "most", "sampled"))
def read_prompts(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    padding: jax.Array,
    edits: dict[str, Edit],
    sampling: Sampling,
    most: int,
    sampled: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Prompts int [B,S], padded at the left by `padding` int [B] -> the next token int [B], and keys and values [L,B,S+most,K,H]."""
    layout = causal_layout(tokens.shape[0], tokens.shape[1], padding)
    h, cached = run_blocks(config, params, tokens, layout, edits, ("cached_key", "cached_value"))
    room = ((0, 0), (0, 0), (0, most), (0, 0), (0, 0))
    caches = jnp.pad(cached["cached_key"], room), jnp.pad(cached["cached_value"], room)
    return _choose(config, params, h[:, -1], jnp.int32(0), sampling, sampled), caches


@partial(jax.jit, static_argnames=("config", "sampled"), donate_argnames=("caches",))
def write_token(
    config: ModelConfig,
    params: Params,
    token: jax.Array,
    caches: tuple[jax.Array, jax.Array],
    padding: jax.Array,
    length: jax.Array,
    step: jax.Array,
    edits: dict[str, Edit],
    sampling: Sampling,
    sampled: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The token after `token` int [B], the `step`-th that was written after prompts of `length` columns; and the caches with it.

    One call a token, and no loop over tokens inside: with caches carried by a `while` loop, XLA on the CPU (jaxlib 0.10) read
    stale keys and values on two devices from eight rows each on.
    """
    column, columns = length + step, jnp.arange(caches[0].shape[2])
    position = (column - padding)[:, None]
    index = TokenIndex(position, length - padding)
    angles, windows = model_angles(config, position), layer_windows(config)
    seen = (columns < column) & (columns >= padding[:, None])

    def layer(h: jax.Array, inputs: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        arrays, window, number, cache = inputs
        block, held = open_block(config, arrays), []

        def touch(name: str, a: jax.Array) -> jax.Array:
            return apply_edit(_now(edits[name], number), SITES[name], a, number, index) if name in edits else a

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            held.extend((key, value))
            return _attend_cached(config, query, key, value, cache, seen & (column - columns < window))

        h = block.mlp(block.attention(h, angles(window), attend, touch), touch)
        return h, tuple(held)

    inputs = params["blocks"], windows, jnp.arange(config.layers), caches
    h, new = jax.lax.scan(layer, embed(config, params, token[:, None], position), inputs)
    caches = jax.tree.map(lambda cache, x: jax.lax.dynamic_update_slice_in_dim(cache, x, column, 2), caches, new)
    return _choose(config, params, h[:, -1], step + 1, sampling, sampled), caches


def _choose(config: ModelConfig, params: Params, h: jax.Array, step: jax.Array, sampling: Sampling, sampled: bool) -> jax.Array:
    """The next token [B] after residual streams [B,D]."""
    logits = as_logits(config, contract("BD,VD->BV", final_norm(config, params, h), head(params)))
    if not sampled:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _nucleus(logits / sampling.temperature, sampling.top_p)
    draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)  # noqa: E731
    return jax.vmap(draw)(sampling.keys, logits).astype(jnp.int32)


def _attend_cached(
    config: ModelConfig, query: jax.Array, key: jax.Array, value: jax.Array, cache: tuple[jax.Array, jax.Array], seen: jax.Array
) -> jax.Array:
    """Attention of one new token to those before it and to itself.

    query [B,1,K,G,H], key and value [B,1,K,H], cache two [B,S,K,H], seen bool [B,S] -> [B,1,K,G,H].
    """
    before = attention_scores(config, contract("BTKGH,BSKH->BTKGS", query, cache[0]))
    before = jnp.where(seen[:, None, None, None], before, MASKED)
    own = attention_scores(config, contract("BTKGH,BTKH->BTKG", query, key))[..., None]
    pattern = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1).astype(value.dtype)
    mixed = contract("BTKGS,BSKH->BTKGH", pattern[..., :-1], cache[1])
    return (mixed + pattern[..., -1:].astype(jnp.float32) * value[:, :, :, None]).astype(value.dtype)


def _now(edit: Edit, layer: jax.Array) -> Edit:
    """A dense edit's slice of one layer."""
    if edit.where is not None:
        return edit
    take = lambda x: x if jnp.ndim(x) == 0 else jnp.asarray(x)[jnp.minimum(layer, jnp.shape(x)[0] - 1)]  # noqa: E731
    return Edit(take(edit.gate), take(edit.value), take(edit.add), edit.basis)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B,V] of the fewest tokens whose probabilities reach `top_p`; the others are minus infinity (Holtzman et al. 2020)."""
    order = jnp.argsort(-logits, axis=-1)
    share = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), axis=-1)
    kept = jnp.cumsum(share, axis=-1) - share < top_p
    mask = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    return jnp.where(mask, logits, -jnp.inf)


def stop_tokens(model: Model) -> list[int]:
    """Tokens that end an answer: those of the tokenizer and of the checkpoint's config."""
    named = (model.source_config or {}).get("eos_token_id")
    found = set(named) if isinstance(named, list) else {named}
    if model.tokenizer is not None:
        vocabulary = model.tokenizer.get_vocab()
        found |= {model.tokenizer.eos_token_id} | {vocabulary[token] for token in ENDS if token in vocabulary}
    return sorted(token for token in found if isinstance(token, int))


def generate_ids(
    model: Model,
    prompts: Sequence[Any],
    most: int = 64,
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
        most: tokens written at most.
        temperature: 0 takes the most likely token; above, tokens are sampled.
        top_p: sample among the fewest tokens whose probabilities reach this.
        edits: site -> `Edit`; entries may name a row, which is the number of a prompt. Dense fields have no token axis but one of
            length 1.
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
    if most < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"Tokens ({most}) are at least 1, temperature ({temperature}) is not negative, top_p ({top_p}) is in (0, 1].")
    if where not in WHERE:
        raise unknown("where", where, WHERE)
    check_tokens(config, prompts, "Prompt", model.tokenizer)
    if (longest := max(map(len, prompts))) + most > config.max_length:
        raise UserError(f"A prompt of {longest} tokens and {most} more exceed what this model takes: {config.max_length}.")
    checked = _check(model, edits)
    halves = [checked if where in ("both", half) else {} for half in ("prompt", "generated")]
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
        out = _write(model, place(tokens), place(padding), len(chosen), ends, stop_texts, sampling, halves, most, temperature > 0)
        for row, i in enumerate(chosen):
            written[i] = out[row]
        report(len(chosen))
    return written


def generate(model: Model, prompts: Sequence[str | Example], most: int = 64, form: str = "chat", **how: Any) -> list[str]:
    """Continues prompts as texts: each is a user message, rendered with the chat template or another `form`.

    An example's `prefill` opens the answer; what is returned goes on from there.

    Args:
        most: tokens written at most.
        form: how prompts are written: chat, text (which goes straight on), plain, space or qa; see `prompts.forms`.
        how: temperature, top_p, seed, edits, where, stops, stop_texts (left out of the text), rows, report; see `generate_ids`.

    Raises:
        UserError: no tokenizer or chat template; what `generate_ids` raises.
    """
    examples = [Example(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    asked = [render(model.tokenizer, one, form=form) for one in examples]
    written = generate_ids(model, [one.ids for one in asked], most, **how)
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
    most: int,
    sampled: bool,
) -> list[np.ndarray]:
    """The texts of the first `count` rows of one batch; it ends when all of them have ended."""
    config, params, length = model.config, model.params, np.int32(tokens.shape[1])
    token, caches = read_prompts(config, params, tokens, padding, halves[0], sampling, most, sampled)
    columns, stopped = [np.asarray(token)[:count]], np.full(count, most)

    def alive() -> bool:
        """Whether a row goes on, after noting the rows that end with the newest token."""
        stopped[np.isin(columns[-1], ends) & (stopped == most)] = len(columns) - 1
        for row in np.nonzero(stopped == most)[0] if stop_texts else ():
            tail = [column[row] for column in columns[-max(map(len, stop_texts)) - 1 :]]  # a token has a character at least
            if any(text in model.tokenizer.decode(tail) for text in stop_texts):
                stopped[row] = len(columns)
        return bool((stopped == most).any())

    while alive() and len(columns) < most:
        step = np.int32(len(columns) - 1)
        token, caches = write_token(config, params, token, caches, padding, length, step, halves[1], sampling, sampled)
        columns.append(np.asarray(token)[:count])
    return [row[:end] for row, end in zip(np.stack(columns, axis=1), stopped, strict=True)]


def _check(model: Model, edits: Mapping[str, Edit] | None) -> dict[str, Edit]:
    checked = check_edits(edits, model.config.layers, model.config.sizes | {"S": 1})
    for name, edit in checked.items():
        if name == "attention_pattern":
            raise UserError("Attention patterns cannot be edited while text is written: they grow with it. Use `forward`.")
        if edit.where is None and any(jnp.ndim(x) > 2 and jnp.shape(x)[2] > 1 for x in (edit.gate, edit.value, edit.add)):
            raise UserError(f"The edit at {name!r} has values of single tokens; while text is written, name tokens with `where`.")
    return checked
