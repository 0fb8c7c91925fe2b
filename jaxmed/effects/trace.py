"""`jm.trace`: a sweep of modules and heads at every token, or at named spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xarray as xr

from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.sweep import sweep
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair

TRACED = ("attention_out", "mlp_out", "both_out", "residual_out", "head_out")
"""What a trace shows by default."""


def trace(
    model: Model,
    pairs: Sequence[PromptPair],
    outcome: OutcomeName | Sequence[OutcomeName] = "log-odds",
    unit: str | Sequence[str] = TRACED,
    position: str = "each",
    **settings: Any,
) -> xr.Dataset:
    """Layer by token maps: `jm.sweep` with defaults of its own (causal tracing: Meng et al. 2022, arXiv 2202.05262).

    Args:
        position: "each": one effect per token, [pair, layer, ..., position] with positions counted from the right and their texts in the
            coordinate `token`. "spans": one effect per named span, whose tokens are patched together: the pair's columns `span_NAME`, the
            rest of the request, the header. Spans are aligned, so that means over prompts of different lengths make sense.
        outcome, unit, settings: as `jm.sweep` takes them.

    Raises:
        UserError: anything in the arguments that cannot be used; nothing has run then.
    """
    return sweep(model, pairs, outcome, unit, position, **settings)
