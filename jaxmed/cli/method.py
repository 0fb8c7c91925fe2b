"""Which method a sweep takes where none is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxmed.cli import show
from jaxmed.errors import UserError

SHORT = 600.0
"""Seconds that an exact sweep may take by its plan before a screened one is chosen."""


def choose_method(job: Any, out: Path | None) -> Any:
    """The exact job, or where it would take long a screened one that can be had; in a folder with a run, by that run's method. Says so."""
    from jaxmed.effects.cost import plan
    from jaxmed.effects.job import estimate_rate, with_method
    from jaxmed.runs.folder import read_run
    from jaxmed.runs.watch import show_time

    begun = {} if out is None or not out.exists() else read_run(out).get("manifest", {}).get("request", {})
    if begun:
        return job if begun.get("method", "exact") == "exact" else with_method(job, begun["method"])
    seconds = plan(job, estimate_rate(job)).seconds or 0.0
    if seconds < SHORT:
        return job
    try:
        screened = with_method(job, "screened")
    except UserError:  # sets, estimands and outcomes that are computed alone
        return job
    line = f"about {show_time(seconds)} for exact effects of all units: --method screened is taken; --method exact computes all"
    show.lines("method", [line])
    return screened
