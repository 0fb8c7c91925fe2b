"""Weights that carry a behaviour: scores from one pass over examples, masks by rule, edited models. `jaxmed.pruning` in Python."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmed.pruning.apply import apply_mask
    from jaxmed.pruning.masks import Mask, combine, overlap, read_mask, write_mask
    from jaxmed.pruning.rule import Rule
    from jaxmed.pruning.scores import Scores, read_scores, score
    from jaxmed.pruning.selection import random_like, select

_PUBLIC = {
    "apply_mask": "apply",
    "Mask": "masks",
    "combine": "masks",
    "overlap": "masks",
    "read_mask": "masks",
    "write_mask": "masks",
    "Rule": "rule",
    "Scores": "scores",
    "read_scores": "scores",
    "score": "scores",
    "random_like": "selection",
    "select": "selection",
}
__all__ = [
    "Mask",
    "Rule",
    "Scores",
    "apply_mask",
    "combine",
    "overlap",
    "random_like",
    "read_mask",
    "read_scores",
    "score",
    "select",
    "write_mask",
]


def __getattr__(name: str) -> Any:
    """Imported when first used, so that `jaxmed prune --help` does not wait for JAX."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"jaxmed.pruning.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'jaxmed.pruning' has no attribute {name!r}")
