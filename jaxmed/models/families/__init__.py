"""Families as data: one preset (config keys) and one name table (checkpoint tensors) each. Adding a family touches this folder only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmed.errors import UserError, unknown
from jaxmed.models.config import ModelConfig
from jaxmed.models.families.gemma import GEMMAS
from jaxmed.models.families.gpt2 import GPT2S
from jaxmed.models.families.llama import LLAMAS
from jaxmed.models.families.olmo import OLMOS
from jaxmed.models.families.phi import PHIS
from jaxmed.models.families.reading import INERT
from jaxmed.models.families.table import Family

FAMILIES: dict[str, Family] = {**LLAMAS, **GEMMAS, **OLMOS, **PHIS, **GPT2S}
"""Every family this version runs, by the `model_type` of its config.json."""


def read_config(raw: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the config of a checkpoint.

    Raises:
        UserError: unknown model type, a missing key, or a key that might change the computation and is not understood.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown("model_type", kind, FAMILIES, "This version runs these families.")
    family = FAMILIES[kind]
    for key in sorted(set(raw) - family.known - family.needed.keys() - INERT):
        raise unknown(
            f"config key of a {kind} model:", key, sorted(family.known), "It may change the computation, so the model is refused."
        )
    for key, allowed in family.needed.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise UserError(f"Config key {key!r} is {raw[key]!r}; this family runs only {allowed[0]!r}.")
    try:
        config = family.read({**family.defaults, **raw})
    except KeyError as missing:
        raise UserError(f"The config lacks {missing}, which a {kind} model needs.") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as wrong:
        raise UserError(f"The config of this {kind} model holds a value that cannot be used: {wrong}.") from None
    _check_sizes(config)
    return family, config


def _check_sizes(config: ModelConfig) -> None:
    """Refuses sizes that no model has, before anything is allocated."""
    for letter, size in config.sizes.items():
        if not 0 < size < 2**31:
            raise UserError(f"The config of this {config.family} model gives the size {letter} as {size}; sizes are positive.")
    if config.heads % config.kv_heads:
        raise UserError(f"The config has {config.heads} query heads, which do not divide over {config.kv_heads} key/value heads.")
    if config.experts and not 0 < config.experts_used <= config.experts:
        raise UserError(f"The config uses {config.experts_used} experts per token, of {config.experts}.")
