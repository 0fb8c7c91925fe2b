"""The command `agreement`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags
from jaxmed.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Agreement(ConfigFlags):
    """How well estimates agree with exact effects of the same pairs, from the folders of two sweeps; runs no model."""

    exact: Path
    """The --out folder of a sweep with --method exact."""
    estimate: Path
    """The --out folder of a sweep of the same pairs with another method."""
    out: Path = Path("jaxmed-agreement")
    """Folder for agreement.csv, misses.csv and agreement.html; must not exist yet, or be empty."""

    def run(self) -> None:
        """Compares, writes and prints."""
        from jaxmed.files import check_path
        from jaxmed.reports.agreement import PAGE, check_runs, write_agreement
        from jaxmed.reports.record import read

        check_path(self.out)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"--out {self.out} exists already. Give another name; nothing was written.")
        runs = read(self.exact), read(self.estimate)
        check_runs(*runs)
        self.out.mkdir(parents=True, exist_ok=True)
        rows = write_agreement(*runs, self.out)
        names = ("pairs", "units", "spearman", "pearson", "recall10", "recall100", "recall1000")
        several = len({row["outcome"] for row in rows}) > 1
        cells = [
            [f"{row['unit']} {row['outcome']}" if several else row["unit"], *(_shown(row.get(name)) for name in names)] for row in rows
        ]
        show.table("Estimates against exact effects, means over pairs", ["unit", *names], cells)
        show.out.print(f"agreement: {self.out / PAGE}", markup=False)


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else f"{value:,}"
