"""jaxmed: causal mediation analysis of language models in JAX.

import jaxmed as jm

model = jm.load("smollm2-135m-instruct")
table = jm.sweep(model, jm.read_pairs("harm")[:1])
print(table.neuron)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxmed.memory import keep_freed_memory

if TYPE_CHECKING:
    from jaxmed import pruning, statistics, tokens
    from jaxmed.api import forward, load, sweep
    from jaxmed.distributed import make_mesh
    from jaxmed.errors import UserError
    from jaxmed.finetuning.run import finetune
    from jaxmed.generation import generate
    from jaxmed.interventions import edits, kinds
    from jaxmed.interventions.edits import Edit
    from jaxmed.models.checkpoints.export import export_folder
    from jaxmed.models.model import Model
    from jaxmed.parity.selfcheck import self_check
    from jaxmed.prompts import Example, PromptPair, read_examples, read_pairs
    from jaxmed.results import open_results

__version__ = "0.1.0"

_PUBLIC = {
    "load": "jaxmed.api",
    "Model": "jaxmed.models.model",
    "forward": "jaxmed.api",
    "sweep": "jaxmed.api",
    "PromptPair": "jaxmed.prompts",
    "read_pairs": "jaxmed.prompts",
    "Example": "jaxmed.prompts",
    "read_examples": "jaxmed.prompts",
    "finetune": "jaxmed.finetuning.run",
    "generate": "jaxmed.generation",
    "open_results": "jaxmed.results",
    "export_folder": "jaxmed.models.checkpoints.export",
    "Edit": "jaxmed.interventions.edits",
    "UserError": "jaxmed.errors",
    "make_mesh": "jaxmed.distributed",
    "self_check": "jaxmed.parity.selfcheck",
}
_MODULES = {
    "statistics": "jaxmed.statistics",
    "tokens": "jaxmed.tokens",
    "pruning": "jaxmed.pruning",
    "kinds": "jaxmed.interventions.kinds",
    "edits": "jaxmed.interventions.edits",
}

__all__ = [
    "Edit",
    "Example",
    "Model",
    "PromptPair",
    "UserError",
    "edits",
    "export_folder",
    "finetune",
    "forward",
    "generate",
    "kinds",
    "load",
    "make_mesh",
    "open_results",
    "pruning",
    "read_examples",
    "read_pairs",
    "self_check",
    "statistics",
    "sweep",
    "tokens",
]


keep_freed_memory()


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `jaxmed --help` does not wait for JAX."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'jaxmed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
