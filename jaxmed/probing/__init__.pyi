from .api import score
from .prefixes import Prefix, PrefixSet, by_hand, prefix_scores, read_prefixes, write_prefixes
from .probe import Probe, read_probe, write_probe
from .spec import FitSpec, SearchSpec

__all__ = [
    "FitSpec",
    "Prefix",
    "PrefixSet",
    "Probe",
    "SearchSpec",
    "by_hand",
    "prefix_scores",
    "read_prefixes",
    "read_probe",
    "score",
    "write_prefixes",
    "write_probe",
]
