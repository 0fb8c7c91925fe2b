from .apply import apply_mask
from .masks import Mask, combine, read_mask, write_mask
from .overlaps import overlap
from .rule import Rule
from .scores import Scores, read_scores, score
from .selection import random_like, select

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
