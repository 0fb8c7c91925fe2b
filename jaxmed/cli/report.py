"""The command `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags
from jaxmed.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Report(ConfigFlags):
    """Redraws the HTML page of one or several runs from their saved tables; runs no model."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The --out folders of sweeps, or one of a study, gate, answers or circuits."""
    out: Path | None = None
    """HTML file to write; default: report.html in the first folder."""
    images: tuple[str, ...] = ()
    """Pictures of every figure beside the page, one or several of: svg, png, pdf (needs the extra images, and Chrome or Chromium)."""

    def run(self) -> None:
        """Writes the page."""
        if not self.folders:
            raise UserError("Give at least one --out folder of a sweep: `jaxmed report FOLDER`.")
        if missing := [folder for folder in self.folders if not folder.exists()]:
            raise UserError(f"There is no folder {missing[0]}. Give the --out folder of a sweep, a study, a gate, answers or circuits.")
        from jaxmed.reports.images import check_images, write_images

        check_images(self.images)
        file = self.out or self.folders[0] / "report.html"
        write_report(list(self.folders), file)
        if self.images:
            written = write_images(file, self.images)
            show.out.print(f"{len(written)} pictures: {file.with_name(file.stem)}-*", markup=False)


def write_report(folders: list[Path], file: Path) -> None:
    """Writes the HTML page of finished or half-made runs."""
    from jaxmed.reports.answers import write_answers
    from jaxmed.reports.circuit import write_circuit
    from jaxmed.reports.gate import write_gate
    from jaxmed.reports.mediation import write_mediation
    from jaxmed.reports.misalignment import write_misalignment
    from jaxmed.reports.page import write_report as write
    from jaxmed.reports.study import write_study
    from jaxmed.runs.folder import RUN, read_run
    from jaxmed.runs.legal import check_tables

    pages = {"study": write_study, "gate": write_gate, "mediation": write_mediation, "misalignment": write_misalignment}
    pages |= {"answering": write_answers, "circuit": write_circuit}
    held = [write_one for key, write_one in pages.items() if key in _manifest(folders[0])]
    for folder in folders:
        if (folder / RUN).is_file():
            check_tables(folder, read_run(folder), all_there=True)
    if held and len(folders) > 1:
        raise UserError(f"{folders[0]} has a page of its own; several folders make one page where all of them are of sweeps.")
    if held:
        held[0](folders[0], file)
    else:
        write(folders, file)
    show.out.print(f"report: {file}", markup=False)


def _manifest(folder: Path) -> Any:
    """What the record of a run says that it is; empty without one."""
    from jaxmed.runs.folder import read_run

    try:
        return read_run(folder).get("manifest", {})
    except UserError:
        return {}
