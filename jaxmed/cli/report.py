"""The command `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags
from jaxmed.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Report(ConfigFlags):
    """Redraws the HTML page of one or several runs from their saved tables; runs no model."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The --out folders of sweeps, or one of a study."""
    out: Path | None = None
    """HTML file to write; default: report.html in the first folder."""

    def run(self) -> None:
        """Writes the page."""
        if not self.folders:
            raise UserError("Give at least one --out folder of a sweep: `jaxmed report FOLDER`.")
        write_report(list(self.folders), self.out or self.folders[0] / "report.html")


def write_report(folders: list[Path], file: Path) -> None:
    """Writes the HTML page of finished or half-made runs."""
    from jaxmed.reports.page import write_report as write
    from jaxmed.reports.study import is_study, write_study

    if is_study(folders):
        write_study(folders[0], file)
    else:
        write(folders, file)
    show.out.print(f"report: {file}", markup=False)
