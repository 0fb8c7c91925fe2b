"""What commands show: plans, progress, tables."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def lines(title: str, content: Sequence[str]) -> None:
    """A title and indented lines."""
    out.print(f"[bold]{title}[/bold]")
    for line in content:
        out.print(f"  {line}", markup=False)


@contextmanager
def progress(title: str, total: float, what_counts: str = "effects") -> Iterator[Callable[[float, int, str], None]]:
    """A progress bar on stderr with rate and time left; yields `report(work done, effects (or what counts) done, what)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    import time

    begun = time.perf_counter()
    effects = 0
    with Progress(*columns, console=err, disable=not sys.stderr.isatty(), refresh_per_second=4) as bar:
        task = bar.add_task(title, total=total, rate="")

        def report(work: float, count: int, what: str) -> None:
            nonlocal effects, begun
            if what == "resumed":
                bar.update(task, total=(bar.tasks[task].total or 0) - work)
                return
            effects += count
            pace = speed(effects, time.perf_counter() - begun, what_counts)
            bar.update(task, advance=work, description=f"{title} {what}", rate=pace)

        yield report
    if effects:
        seconds = time.perf_counter() - begun
        what = "exact effects" if what_counts == "effects" else what_counts
        err.print(f"{title}: {effects:,} {what} in {seconds:,.1f} s, {speed(effects, seconds)}")


def speed(count: int, seconds: float, what: str = "") -> str:
    """How many in a second, or how many seconds each where that is less than one."""
    if 0 < count < seconds:
        return f"{seconds / count:,.1f} s each"
    return f"{count / max(seconds, 1e-9):,.0f} {what}/s" if what else f"{count / max(seconds, 1e-9):,.0f} per second"


COLUMNS = {"outcome": "left", "layer": "right", "index": "right", "position": "right", "mean": "right", "share": "right", "p": "right"}


def top_units(folder: Path, count: int = 12) -> None:
    """The first rows of a run's top.csv; columns that hold one value throughout are left out."""
    with (folder / "top.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    for unit in dict.fromkeys(row["unit"] for row in rows):
        of_unit = [row for row in rows if row["unit"] == unit][:count]
        table = Table(title=f"{unit}: largest mean effects (all in {folder / 'top.csv'})", title_justify="left")
        columns = [name for name in COLUMNS if name in ("layer", "mean", "share") or len({row[name] for row in of_unit}) > 1]
        for name in columns:
            table.add_column(name, justify=COLUMNS[name])  # type: ignore[arg-type]
        table.add_column("pairs agreeing")
        promotes = any(row["promotes"] for row in of_unit)
        if promotes:
            table.add_column("output vector promotes", no_wrap=True, overflow="ellipsis")
        for row in of_unit:
            cells = [*(_short(row[name]) for name in columns), row["pairs_agreeing"], *([row["promotes"]] if promotes else [])]
            table.add_row(*(escape(cell) for cell in cells))
        out.print(table)


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}" if "." in text or "e" in text else text
    except ValueError:
        return text
