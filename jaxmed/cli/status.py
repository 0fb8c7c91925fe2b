"""The command `status`."""

from __future__ import annotations

import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags

SHOWN = 8
"""Names of missing items that are printed."""


@dataclass(frozen=True, kw_only=True)
class Status(ConfigFlags):
    """Says how far every run in a folder is, from any machine that sees it: what is done, what is missing, who writes to it."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path(),)
    """The --out folders of runs, or folders that hold several."""
    json: bool = False
    """Print a line of JSON per run instead of a table."""
    prometheus: Path | None = None
    """Text file for Prometheus' node exporter, written whole at once."""

    def run(self) -> None:
        """Reads records and markers, prints."""
        from jaxmed.files import check_file, simple, write_text
        from jaxmed.runs.status import find_runs, prometheus
        from jaxmed.runs.watch import show_time

        if self.prometheus is not None:
            check_file(self.prometheus, "--prometheus")
        runs = [one for folder in self.folders for one in find_runs(folder)]
        if self.prometheus is not None:
            write_text(self.prometheus, prometheus(runs))
        if self.json:
            for one in runs:
                show.out.print(json_text.dumps(simple(one.plain())), markup=False, highlight=False)
            return
        rows = [
            [
                str(one.folder),
                one.kind,
                one.status,
                "" if one.total is None else f"{one.done:,} of {one.total:,}",
                show_time(one.seconds) if one.seconds else "",
                f"{one.seen:%Y-%m-%d %H:%M:%S}",
            ]
            for one in runs
        ]
        show.table("runs", ["folder", "what", "status", "done", "took", "last written (UTC)"], rows, left=3)
        for one in runs:
            if one.status != "finished" and (one.missing or one.command):
                show.lines(str(one.folder), _left(one))


def _left(one: Any) -> list[str]:
    missing, command = one.missing, one.command
    names = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else "")
    lines = [f"missing: {names}"] * bool(missing)
    if one.status == "running":
        return [*lines, f"written by {one.writer}"]
    again = "" if "--resume" in command else " --resume"
    return lines + [f"continue with: {command}{again}"] * bool(command)
