"""Losses of the scored tokens of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmed.axes import whole_rows
from jaxmed.batching.batches import Batch, batch_layout
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.params import Params
from jaxmed.models.transformer import as_logits, embed, final_norm, head
from jaxmed.models.vocabulary import log_total
from jaxmed.runner import Recording, run


def response_loss(config: ModelConfig, params: Params, batch: Batch, remat: bool = False) -> jax.Array:
    """Sum over the scored tokens of minus their log-probability, times their weights."""
    layout = batch_layout(batch)
    stream = embed(config, params, batch.tokens, layout.position) if batch.h is None else batch.h
    ran = run(config, params, stream, layout, Recording(remat=remat), first=_first(config, params))
    return (token_losses(config, params, ran.stream, batch) * batch.weight).sum()


def _first(config: ModelConfig, params: Params) -> int:
    """The number of the lowest of the blocks at hand."""
    return config.layers - jax.tree.leaves(params["blocks"])[0].shape[0]


def token_losses(config: ModelConfig, params: Params, h: jax.Array, batch: Batch) -> jax.Array:
    """Minus the log-probability of every scored token [B,R], from the last residual stream [B,T,D]; other tokens are not unembedded."""
    x = final_norm(config, params, jnp.take_along_axis(h, batch.column[..., None], 1))
    logits = as_logits(config, contract("BRD,VD->BRV", x, head(params)))
    own = as_logits(config, contract("BRD,BRD->BR", x, head(params)[whole_rows(config.mesh, batch.target)]))
    return log_total(logits) - own
