"""What long work shows: consoles, plans in lines, progress with rate and time left, on a terminal or line by line where there is none."""

from __future__ import annotations

import datetime
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmed.errors import visible
from jaxmed.runs import signals


class _Console(Console):
    """A console whose work goes on where the reader of its pipe has gone."""

    def on_broken_pipe(self) -> None:
        close_pipe("stderr" if self.stderr else "stdout")


def close_pipe(name: str = "stdout") -> None:
    """What is still to be printed to a standard stream goes nowhere: the reader of the pipe has gone."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, name).fileno())
    except (OSError, ValueError):  # a stream without a file
        setattr(sys, name, io.StringIO())


out = _Console(highlight=False, soft_wrap=True)
err = _Console(stderr=True, highlight=False, soft_wrap=True)
RESUMED = "resumed"
"""Said of work that an earlier run has done: it leaves the total instead of being counted."""
FIRST_LINE, LINES = 5.0, (10.0, 300.0)
"""Without a terminal: seconds before the first line of progress, and between two lines (shortest, longest)."""


@runtime_checkable
class Watch(Protocol):
    """Told of progress after every item."""

    def __call__(self, work: float, count: int, what: str) -> None:
        """Tells that more was done.

        Args:
            work: part of the total that was announced (FLOPs, steps, examples).
            count: what a reader counts (effects, tokens, examples).
            what: the item, or RESUMED.
        """


Display = Callable[[str, float, str], AbstractContextManager[Watch]]
"""Opens the display of one piece of work: (title, total work, what is counted)."""


def silent(work: float, count: int, what: str) -> None:
    """A `Watch` that shows nothing."""


def no_display(title: str, total: float, unit: str) -> AbstractContextManager[Watch]:
    """A `Display` that shows nothing."""
    return nullcontext(silent)


def lines(title: str, content: Sequence[str]) -> None:
    """A title and indented lines."""
    out.print(visible(title), style="bold", markup=False)
    for line in content:
        out.print(f"  {visible(line)}", markup=False)


_as_json = False


def log_json(on: bool) -> None:
    """Whether progress is told in lines of JSON, for programs that collect logs."""
    global _as_json
    _as_json = on


@contextmanager
def progress(title: str, total: float, what_counts: str = "effects") -> Iterator[Watch]:
    """Progress on stderr: a bar with rate and time left on a terminal; lines now and then in a pipe or on a dumb terminal; or JSON."""
    shown = _json_lines if _as_json else _bar if err.is_terminal and not err.is_dumb_terminal else _lines
    tally = Tally(total)
    with shown(title, tally, what_counts) as refresh:

        def report(work: float, count: int, what: str) -> None:
            tally.add(work, count, what)
            refresh(what)
            signals.check()  # whatever loop reports here ends where a callback has swallowed a signal

        yield report
    if tally.count and not _as_json:
        what = "exact effects" if what_counts == "effects" else what_counts
        err.print(f"{title}: {tally.count:,} {what} in {tally.seconds:,.1f} s, {speed(tally.count, tally.seconds)}", markup=False)


class Tally:
    """What was done of a total, and since when."""

    def __init__(self, total: float):
        self.total, self.done, self.count, self.begun = total, 0.0, 0, time.perf_counter()

    def add(self, work: float, count: int, what: str) -> None:
        """Counts work; what an earlier run did leaves the total."""
        if what == RESUMED:
            self.total -= work
        else:
            self.done, self.count = self.done + work, self.count + count

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total > 0 else 1.0


@contextmanager
def _bar(title: str, tally: Tally, unit: str) -> Iterator[Callable[[str], None]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, refresh_per_second=4) as bar:
        task = bar.add_task(title, total=tally.total, rate="")

        def refresh(what: str) -> None:
            name = title if what == RESUMED else f"{title} {what}"
            bar.update(task, total=tally.total, completed=tally.done, description=name, rate=speed(tally.count, tally.seconds, unit))

        yield refresh


def _now_and_then(tally: Tally, tell: Callable[[str, float], None]) -> Callable[[str], None]:
    """Tells (item, seconds left) when enough time has passed since the last time."""
    following = time.monotonic() + FIRST_LINE

    def refresh(what: str) -> None:
        nonlocal following
        if time.monotonic() < following or not tally.done:
            return
        left = tally.seconds * (1 - tally.share) / tally.share
        tell("" if what == RESUMED else what, left)
        following = time.monotonic() + min(max(LINES[0], (left + tally.seconds) / 20), LINES[1])

    return refresh


@contextmanager
def _lines(title: str, tally: Tally, unit: str) -> Iterator[Callable[[str], None]]:
    def tell(item: str, left: float) -> None:
        rate = speed(tally.count, tally.seconds, unit)
        err.print(f"{' '.join([title, *[item] * bool(item)])}: {tally.share:.1%}, {rate}, {show_time(left)} left", markup=False)

    yield _now_and_then(tally, tell)


@contextmanager
def _json_lines(title: str, tally: Tally, unit: str) -> Iterator[Callable[[str], None]]:
    def tell(item: str, left: float) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        found = {"time": now, "work": title, "item": item, "share": round(tally.share, 6), "count": tally.count, "unit": unit}
        found |= {"seconds": round(tally.seconds, 3), "seconds_left": round(left, 3)}
        err.print(json.dumps(found), markup=False, highlight=False)

    yield _now_and_then(tally, tell)
    tell("", 0.0)


def speed(count: int, seconds: float, what: str = "") -> str:
    """How many in a second, or how many seconds each where that is less than one."""
    if 0 < count < seconds:
        return f"{seconds / count:,.1f} s each"
    return f"{count / max(seconds, 1e-9):,.0f} {what}/s" if what else f"{count / max(seconds, 1e-9):,.0f} per second"


def show_time(seconds: float) -> str:
    """Seconds as "42 s", "3 min 5 s" or "2 h 10 min"."""
    seconds = max(1, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
