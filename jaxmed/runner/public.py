"""`jm.forward`: a model over token ids, with interventions as arguments, checked before anything is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmed.errors import UserError, unknown
from jaxmed.interventions.checks import Extent, check_edits
from jaxmed.interventions.edits import Edit
from jaxmed.interventions.sites import INTERNAL, check_sites, site_name
from jaxmed.models.model import Model
from jaxmed.runner.calls import forward as run_forward
from jaxmed.runner.layout import causal_layout
from jaxmed.tokens import check_length

LOGITS = ("all", "last", "none")


def forward(
    model: Model,
    tokens: Any,
    edits: Mapping[str, Edit] | None = None,
    taps: Sequence[str] = (),
    padding: Any = None,
    logits: str = "all",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the model over token ids, with interventions as arguments.

    Safe inside `jax.jit`, `grad` and `vmap`: `Model` is a pytree of its weights, so pass it as an argument of the jitted function. (A model
    that the function closes over would be baked into the program as constants.) Every prompt length is compiled anew; `jm.tokens.batch`
    pads prompts to shared lengths.

    Args:
        tokens: int [B, T], or [T] for one prompt.
        edits: site -> `Edit`; see `jm.edits` for functions that make them.
        taps: sites to return, by name or TransformerLens alias.
        logits: "all" tokens, the "last" of every row, or "none".
        padding: int [B], how many tokens at the left of each row are padding; they are neither seen nor counted.

    Returns:
        logits float32 [B, T, V] ([B, 1, V] of the last token, or [B, 0, V]), and site -> activations [L, B, T, ...], under the names
        given in `taps`.

    Raises:
        UserError: a site that is unknown or that the model lacks, an edit out of range or not finite, a token id outside the vocabulary,
            text instead of token ids, more tokens than learned positions.
    """
    if not isinstance(model, Model):
        raise UserError(f"model is what jm.load returns, not a {type(model).__name__}.")
    if isinstance(tokens, str) or (isinstance(tokens, Sequence) and any(isinstance(row, str) for row in tokens)):
        raise UserError("tokens is an int array [B, T], not text. Make it of texts: ids, padding = jm.tokens.batch(model, texts).")
    try:
        ids = jnp.asarray(tokens)
    except (TypeError, ValueError):
        raise UserError("tokens is an int array [B, T], rows of one length. Pad them: ids, padding = jm.tokens.pad(rows).") from None
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim not in (1, 2):
        raise UserError(f"tokens is an int array [B, T], not {ids.dtype} {list(ids.shape)}.")
    ids = ids[None] if ids.ndim == 1 else ids
    config = model.config
    if not isinstance(ids, Tracer) and ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocabulary:
        raise UserError(f"tokens holds ids from {int(ids.min())} to {int(ids.max())}; legal: 0 to {config.vocabulary - 1}.")
    if not ids.size:
        raise UserError(f"tokens {list(ids.shape)} holds no token.")
    _check_padding(padding, *ids.shape)
    if padding is None or not isinstance(padding, Tracer):
        check_length(config, ids.shape[1] - int(np.min(0 if padding is None else padding)), "tokens")
    taps = (taps,) if isinstance(taps, str) else taps
    names = tuple(name if name in INTERNAL else site_name(name) for name in taps)
    check_sites(config.sizes, names)
    left = np.zeros(ids.shape[0], int) if padding is None else padding
    rows = None if isinstance(left, Tracer) else tuple(int(ids.shape[1] - count) for count in np.asarray(left))
    checked = check_edits(edits, Extent(config.layers, config.sizes | {"S": ids.shape[1], "T": ids.shape[1]}, rows))
    if logits not in LOGITS:
        raise unknown("logits", logits, LOGITS)
    layout = causal_layout(ids.shape[0], ids.shape[1], padding)
    found, recorded = run_forward(config, model.params, ids, layout, checked, tuple(sorted(set(names))), logits)
    return found, {asked: recorded[name] for asked, name in zip(taps, names, strict=True)}


def _check_padding(padding: Any, rows: int, length: int) -> None:
    """Raises a UserError for what is no number of pad tokens per row, or leaves a row without a token."""
    if padding is None or (isinstance(padding, Tracer) and padding.shape == (rows,)):
        return
    given = np.asarray(padding)
    if given.shape != (rows,) or given.dtype.kind not in "iu" or not 0 <= given.min() <= given.max() < length:
        raise UserError(f"padding is int [B] = [{rows}], the number of pad tokens at the left of each row, 0 to {length - 1}.")
