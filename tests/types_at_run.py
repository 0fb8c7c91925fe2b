"""Annotations that are checked while tests run: `JAXMED_TYPES=1 pytest ...` has every function of the package checked by beartype."""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is a float where a float is expected, as for pyright."""


def check_package() -> None:
    """Has all modules of the package checked that are imported from now on."""
    install_import_hook("jaxmed", f"{__name__}.checked")
