"""`jm.generate`: prompts of any lengths, in batches of similar ones, to texts that end where they should."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmed.axes import row_parts
from jaxmed.errors import NOT_FINITE, UserError, unknown
from jaxmed.files import odd_text
from jaxmed.generation.following import Following, check_following, write_following
from jaxmed.generation.sampling import Sampling
from jaxmed.generation.writers import Batch, write_by_layer, writer
from jaxmed.interventions.checks import Extent, check_edits
from jaxmed.interventions.edits import Edit
from jaxmed.interventions.writing import split_edits
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.tokens import bucket, check_several, check_tokens, end_tokens, has_text, render, written_text

WHERE = ("both", "prompt", "generated")
ROWS = 64
"""Prompts that are answered at once."""


def stop_tokens(model: Model) -> list[int]:
    """Tokens that end an answer of this model."""
    return end_tokens(model.tokenizer, model.generation_config, model.source_config)


def generate_ids(
    model: Model,
    prompts: Sequence[Any],
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    edits: Mapping[str, Edit] | None = None,
    follow: Following | None = None,
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
        seed: of the samples; a sequence has one for every prompt, whose text then depends on it alone.
        follow: units that keep the values which another model has on the text so far; it goes with no edits.
        edits: site -> `Edit`; entries may name a row, which is the number of a prompt, and position="current", which is every token
            as it is written; other positions count from a prompt's beginning, or with where="prompt" from its end. Dense fields have no
            token axis but one of length 1.
        where: the tokens that edits and `follow` act on: "both", "prompt", "generated".
        stops: tokens that end a text; default: those of the tokenizer and config.
        stop_texts: nothing more is written once one of these has been; they are left in.
        rows: prompts at once; with edits or `follow` all prompts run at once.
        report: called with the number of prompts after every batch.

    Returns:
        The written token ids of every prompt, without the token that ended it.

    Raises:
        UserError: no prompts, or an empty one; values out of range; an edit that cannot act here; too many tokens for the model; logits
            that are not finite.
    """
    prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    _check_values(prompts, max_tokens, temperature, top_p, where, stop_texts)
    check_tokens(model.config, prompts, "A prompt with its answer", model.tokenizer, max_tokens)
    checked = check_edits(edits, Extent(model.config.layers, model.config.sizes | {"S": 1, "T": 1}))
    if follow is not None:
        check_following(model, follow, len(prompts), bool(checked))
    halves = split_edits(checked, where, [len(prompt) for prompt in prompts], max_tokens)
    ends = np.asarray(stop_tokens(model) if stops is None else stops, np.int32)
    write = writer(model) if follow is None else partial(write_following, follow, where)
    at_once = bool(checked) or follow is not None
    devices = 1 if write is write_by_layer else row_parts(model.mesh)
    size = len(prompts) if at_once else min(rows, len(prompts))
    size = -(-size // devices) * devices
    order = range(len(prompts)) if at_once else sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    keys = jax.random.split(jax.random.key(seed), len(prompts)) if isinstance(seed, int) else jax.vmap(jax.random.key)(np.asarray(seed))
    written: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for at in range(0, len(prompts), size):
        chosen = list(order[at : at + size])
        tokens, padding = _padded([prompts[i] for i in chosen], size)
        numbers = np.asarray([*chosen, *[0] * (size - len(chosen))])
        sampling = Sampling(keys[numbers], np.float32(temperature or 1.0), np.float32(top_p), temperature == 0)
        columns = write(model, Batch(tokens, padding, max_tokens, halves[0], halves[1], sampling))
        out = _until_ended(model, columns, tokens[: len(chosen), -1], ends, stop_texts, max_tokens)
        for row, i in enumerate(chosen):
            written[i] = out[row]
        report(len(chosen))
    return written


def _check_values(
    prompts: Sequence[np.ndarray], max_tokens: int, temperature: float, top_p: float, where: str, stop_texts: Sequence[str]
) -> None:
    """Raises a UserError for what `generate_ids` cannot use, whatever the model."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("There is no prompt to continue." if not prompts else "A prompt has no tokens.")
    if max_tokens < 1 or not 0 <= temperature < np.inf or not 0 < top_p <= 1:
        raise UserError(f"Tokens ({max_tokens}) are at least 1, temperature ({temperature}) is not negative, top_p ({top_p}) is in (0, 1].")
    if said := odd_text(list(stop_texts), "stop_texts"):
        raise UserError(f"{said}.")
    if where not in WHERE:
        raise unknown("where", where, WHERE)


def generate(model: Model, prompts: Sequence[str | Example], max_tokens: int = 64, form: str = "chat", **how: Any) -> list[str]:
    """Continues prompts as texts: each is a user message, rendered with the chat template or another `form`.

    An example's `prefill` opens the answer; what is returned goes on from there.

    Args:
        max_tokens: tokens written at most.
        form: how prompts are written: chat, text (which goes straight on), plain, space or qa; see `prompts.forms`.
        how: temperature, top_p, seed, edits, follow, where, stops, stop_texts (left out of the text), rows, report; see `generate_ids`.

    Raises:
        UserError: no tokenizer or chat template; what `generate_ids` raises.
    """
    check_several(prompts)
    examples = [Example(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    asked = [render(model.tokenizer, one, form=form) for one in examples]
    written = generate_ids(model, [one.ids for one in asked], max_tokens, **how)
    texts = [written_text(model.tokenizer, one, ids) for one, ids in zip(asked, written, strict=True)]
    return [cut_at(text, how.get("stop_texts", ())) for text in texts]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops` in it."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def _padded(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int [rows, bucket], padded at the left, and how many columns of each are padding; rows too many hold one token."""
    length = bucket(max(map(len, prompts)))
    tokens, padding = np.zeros((rows, length), np.int32), np.full(rows, length - 1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        padding[row] = length - len(prompt)
    return tokens, padding


def _until_ended(
    model: Model, steps: Iterator[np.ndarray], last: np.ndarray, ends: np.ndarray, stop_texts: Sequence[str], max_tokens: int
) -> list[np.ndarray]:
    """Every row of what `steps` write behind prompts that end with `last` int [B], up to where it stops; nothing is written beyond."""
    stopped = np.full(len(last), max_tokens)
    columns: list[np.ndarray] = []
    for column in (column[: len(last)] for step in steps for column in step):
        columns.append(column)
        if (column[stopped == max_tokens] < 0).any():
            raise UserError(f"{model.name}: logits are not finite, so there is no likeliest token. {NOT_FINITE}")
        stopped[np.isin(column, ends) & (stopped == max_tokens)] = len(columns) - 1
        for row in np.nonzero(stopped == max_tokens)[0] if stop_texts else ():
            if has_text(model.tokenizer, last[row], [column[row] for column in columns], stop_texts):
                stopped[row] = len(columns)
        if len(columns) == max_tokens or (stopped < max_tokens).all():
            break
    return [row[:end] for row, end in zip(np.stack(columns, axis=1), stopped, strict=True)]
