"""Whether `--resume` would go on with the run that --out holds: known before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmed.models.catalog import needs_building
from jaxmed.runs.legal import Legal, check_folder, check_same
from jaxmed.runs.lock import read_run


def check_resumed(
    flags: Any, legal: Legal, models: Sequence[Any], manifest: Callable[[], Mapping[str, Any]], reused: Sequence[str] = ()
) -> None:
    """Raises a UserError where --out holds a run of another request.

    Models that are not built or fetched yet have no identity; of those the run itself finds out, when it begins.

    Args:
        flags: of the command.
        models: those that the manifest names, without weights; None among them is passed over.
        manifest: makes what the run will compare.
        reused: see `RunFolder.open`.
    """
    names = (flags.model, getattr(flags, "source_model", None) or "")
    known = all(model.files for model in models if model is not None) and not any(map(needs_building, names))
    if known and check_folder(flags.out, flags.resume, legal):
        check_same(flags.out, read_run(flags.out).get("manifest", {}), manifest(), reused)
