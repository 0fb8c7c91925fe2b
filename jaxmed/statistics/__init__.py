"""Statistics of effects over pairs, and every interval of the package: numpy in, numpy out."""

from jaxmed.statistics.blocks import Blocks, group_means, take
from jaxmed.statistics.flips import DISCOVERIES, flip_tests, max_t, replicate, sign_flip, smallest_p, studentised
from jaxmed.statistics.intervals import (
    FEWEST_FOR_INTERVAL,
    auc,
    auc_interval,
    leaves_out_zero,
    mean_interval,
    percentile_interval,
    ratio_interval,
    resample_weights,
    wilson,
)
from jaxmed.statistics.stability import TOP
from jaxmed.statistics.summary import Replication, Summary, null_margin, ranked_by, share, strongest, summarise

__all__ = [
    "DISCOVERIES",
    "FEWEST_FOR_INTERVAL",
    "TOP",
    "Blocks",
    "Replication",
    "Summary",
    "auc",
    "auc_interval",
    "flip_tests",
    "group_means",
    "leaves_out_zero",
    "max_t",
    "mean_interval",
    "null_margin",
    "percentile_interval",
    "ranked_by",
    "ratio_interval",
    "replicate",
    "resample_weights",
    "share",
    "sign_flip",
    "smallest_p",
    "strongest",
    "studentised",
    "summarise",
    "take",
    "wilson",
]
