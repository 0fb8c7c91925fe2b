"""The calls of `run`: full forwards, restarted runs, and continuations of cached prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxmed.interventions.acting import Staged
from jaxmed.interventions.edits import Edit
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.params import Params
from jaxmed.models.transformer import as_logits, embed, final_norm, head
from jaxmed.runner.blocks import PLAIN, Ran, Recording, run
from jaxmed.runner.layout import Entry, Layout, Prefix, Restart


def run_tokens(config: ModelConfig, params: Params, tokens: jax.Array, layout: Layout, recording: Recording = PLAIN, **how: Any) -> Ran:
    """`run` over tokens int [B,T], from their embedding on; `how` as `run` takes it."""
    return run(config, params, embed(config, params, tokens, layout.position), layout, recording, **how)


def logits_of(config: ModelConfig, params: Params, stream: jax.Array) -> jax.Array:
    """Logits float32 [...,V] of residual streams [...,D]."""
    flat = final_norm(config, params, stream.reshape(-1, stream.shape[-1]))
    return as_logits(config, contract("UD,VD->UV", flat, head(params))).reshape(*stream.shape[:-1], config.vocabulary)


@partial(jax.jit, static_argnames=("config", "taps", "logits"))
def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    layout: Layout,
    edits: dict[str, Edit] | None = None,
    taps: tuple[str, ...] = (),
    logits: str = "all",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """tokens int [B,T] -> logits float32 [B,T,V] and the tapped activations, each [L,B,T,...]; logits of "all", "last" or "none"."""
    ran = run_tokens(config, params, tokens, layout, Recording(taps), edits=edits)
    first = {"all": 0, "last": tokens.shape[1] - 1, "none": tokens.shape[1]}[logits]
    return logits_of(config, params, ran.stream[:, first:]), ran.taps


Readout = Callable[[ModelConfig, Params, jax.Array, Any], jax.Array]
"""(config, params, last residual stream [U,R,D] of the columns asked for, reads) -> outcomes [..., U].

Hashable: it is part of the program."""


@partial(jax.jit, static_argnames=("config", "readout"))
def propagate(
    config: ModelConfig,
    params: Params,
    restart: Restart,
    stream: jax.Array,
    first: jax.Array,
    reads: Any,
    readout: Readout,
    asked: jax.Array,
    entry: Entry | None = None,
    edits: Staged | None = None,
    minus: jax.Array | None = None,
) -> jax.Array:
    """Outcomes of many counterfactual runs, restarted from the residual stream.

    Args:
        stream: float32 [U,T,D], the input of layer `first`, the first layer that runs.
        reads: what `readout` reads.
        asked: int [R], the columns whose last residual stream `readout` gets.
        entry: rows that join the stream at layers of their own.
        edits: further interventions on rows, at any layers from `first` on: joint sets, paths.
        minus: float32 [U,T,D], taken from the last residual stream before it is read.

    Returns:
        What `readout` returns, [..., U].
    """
    ran = run(config, params, stream, restart.layout, first=first, prefix=restart.prefix, entry=entry, edits=edits, asked=asked)
    stream = ran.stream if minus is None else ran.stream - minus[:, asked]
    return readout(config, params, stream, reads)


def extend(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    layout: Layout,
    prefix: Prefix,
    recording: Recording = PLAIN,
    **how: Any,
) -> Ran:
    """Continues cached prompts: tokens int [B,T] behind a prefix of b prompts, B / b continuations of each in a row.

    Generation is the case T = 1. (Given responses are packed behind their prompt instead, for no more FLOPs: `batching/answered.py`.)
    `layout.position` counts from the prompts' beginning.
    """
    return run_tokens(config, params, tokens, layout, recording, prefix=prefix, **how)
