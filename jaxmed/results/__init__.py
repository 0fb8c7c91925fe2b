"""Results of sweeps on disk."""

from jaxmed.results.damage import Damage, damaged_labels, damaged_parts, mend, open_results
from jaxmed.results.table import (
    LEGAL,
    NEAR_TIE,
    REPORT,
    TABLE,
    TOP,
    Table,
    Variable,
    append,
    create,
    lay_out,
    near_ties,
    not_finite,
    note_sums,
    open_group,
)

__all__ = [
    "LEGAL",
    "NEAR_TIE",
    "REPORT",
    "TABLE",
    "TOP",
    "Damage",
    "Table",
    "Variable",
    "append",
    "create",
    "damaged_labels",
    "damaged_parts",
    "lay_out",
    "mend",
    "near_ties",
    "not_finite",
    "note_sums",
    "open_group",
    "open_results",
]
