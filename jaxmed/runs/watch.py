"""What long work shows on a terminal: consoles, plans in lines, progress with rate and time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
