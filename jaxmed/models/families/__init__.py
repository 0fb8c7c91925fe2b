"""Families as data: one preset (config keys) and one name table (checkpoint tensors) each. Adding a family touches this folder only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmed.errors import UserError, all_problems, hint, quoted, unknown
from jaxmed.models.config import ModelConfig
from jaxmed.models.families.checks import wrong_types, wrong_values
from jaxmed.models.families.gemma import GEMMAS
from jaxmed.models.families.gpt2 import GPT2S
from jaxmed.models.families.harmless import is_harmless
from jaxmed.models.families.llama import LLAMAS
from jaxmed.models.families.olmo import OLMOS
from jaxmed.models.families.phi import PHIS
from jaxmed.models.families.table import Family

FAMILIES: dict[str, Family] = {**LLAMAS, **GEMMAS, **OLMOS, **PHIS, **GPT2S}
"""Every family this version runs, by the `model_type` of its config.json."""


QUANTISED = "quantization_config"


def read_config(raw: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the config of a checkpoint.

    Raises:
        UserError: unknown model type; or, all together, keys that might change the computation and are not understood, missing
            keys, and values that cannot be used.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown("model_type", kind, FAMILIES, "This version runs these families.")
    family = FAMILIES[kind]
    problems = _wrong_keys(raw, family)
    config = None
    try:
        config = family.read({**family.defaults, **raw})
        problems += wrong_values(config)
    except UserError as error:
        problems.append(str(error))
    except KeyError as missing:
        problems.append(f"it lacks {missing}")
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        problems.append(f"it holds a value that cannot be used: {error}")
    if config is None or problems:
        raise all_problems(f"The config of this {kind} model", problems, f"This family uses the keys {', '.join(sorted(family.known))}.")
    return family, config


def _wrong_keys(raw: Mapping[str, Any], family: Family) -> list[str]:
    """Keys that are not understood, or whose values are none that the family runs."""
    known = sorted(family.known)
    extra = [key for key in sorted(set(raw) - family.known - family.needed.keys()) if not is_harmless(key, raw)]
    wrong = [f"unknown key {quoted(key)}, which may change the computation.{hint(key, known)}" for key in extra if key != QUANTISED]
    if QUANTISED in extra:
        wrong.append(
            f"key {QUANTISED!r}: its weights are quantised ({quoted(raw[QUANTISED])[:200]}); give the model's plain weights, or a GGUF file"
        )
    for key, allowed in family.needed.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            wrong.append(f"key {key!r} is {quoted(raw[key])}; this family runs only {allowed[0]!r}")
    return [*wrong, *wrong_types(raw, family.known)]
