"""Weights that carry a behaviour: scores from one pass over examples, masks by rule, edited models. `jaxmed.pruning` in Python."""

from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.masks import Mask, combine, overlap, read_mask, write_mask
from jaxmed.pruning.scores import Scores, read_scores, score
from jaxmed.pruning.select import Rule, select

__all__ = ["Mask", "Rule", "Scores", "apply_mask", "combine", "overlap", "read_mask", "read_scores", "score", "select", "write_mask"]
