"""Progress: a bar on a terminal, lines at intervals elsewhere; work of an earlier run is not counted."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from jaxmed.runs import watch
from jaxmed.runs.cost import Cost, cost_lines


def _console(monkeypatch: pytest.MonkeyPatch, terminal: bool, **environment: str) -> io.StringIO:
    said = io.StringIO()
    console = Console(file=said, stderr=True, highlight=False, soft_wrap=True, force_terminal=terminal, width=80, _environ=environment)
    monkeypatch.setattr(watch, "err", console)
    return said


class _Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    found = _Clock()
    monkeypatch.setattr(watch.time, "perf_counter", found)
    monkeypatch.setattr(watch.time, "monotonic", found)
    return found


def _work(clock: _Clock, items: int, seconds: float) -> None:
    with watch.progress("sweep", items, "effects") as report:
        for number in range(items):
            clock.now += seconds
            report(1, 100, f"pair{number}")


@pytest.mark.parametrize(("terminal", "term"), [(False, "xterm"), (True, "dumb")])
def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, clock: _Clock, terminal: bool, term: str) -> None:
    said = _console(monkeypatch, terminal, TERM=term)
    _work(clock, 60, 2.0)
    lines = said.getvalue().splitlines()
    assert "\x1b" not in said.getvalue()
    assert lines[0] == "sweep pair2: 5.0%, 50 effects/s, 1 min 54 s left"
    assert 5 < len(lines) < 15
    assert lines[-1] == "sweep: 6,000 exact effects in 120.0 s, 50 per second"


@pytest.mark.parametrize(("items", "seconds"), [(3, 0.1), (1, 0.5), (40, 0.1)])
def test_short_work_is_one_line(monkeypatch: pytest.MonkeyPatch, clock: _Clock, items: int, seconds: float) -> None:
    said = _console(monkeypatch, False)
    _work(clock, items, seconds)
    assert len(said.getvalue().splitlines()) == 1


def test_long_work_does_not_fill_a_log(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    said = _console(monkeypatch, False)
    _work(clock, 5000, 10.0)  # fourteen hours
    assert len(said.getvalue().splitlines()) < 250


@pytest.mark.parametrize("environment", [{"TERM": "xterm"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    said = _console(monkeypatch, True, **environment)
    with watch.progress("sweep", 2) as report:
        report(1, 10, "one")
        report(1, 10, "two")
    assert "100.0%" in said.getvalue()
    assert ("\x1b[3" in said.getvalue()) is ("NO_COLOR" not in environment)


def test_what_an_earlier_run_did_leaves_the_total() -> None:
    tally = watch.Tally(10)
    tally.add(6, 0, watch.RESUMED)
    tally.add(1, 5, "x")
    assert (tally.share, tally.count) == (0.25, 5)


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ([Cost("scores", flops=2e12, passes=4)], ["scores: 4 passes, 2.00 TFLOP of matmuls, about 2 s"]),
        ([Cost("read", read=5_000_000), Cost("write", written=2 * 10**9, peak=7)], ["read: 5.0 MB read", None, "in all: 5.0 MB read"]),
        ([Cost("nothing")], ["nothing"]),
    ],
)
def test_costs_add_up_in_words(costs: list[Cost], said: list[Any]) -> None:
    lines = cost_lines(costs, 1e12)
    assert len(lines) == len(said)
    for line, wanted in zip(lines, said, strict=True):
        assert wanted is None or line.startswith(wanted)


def test_the_peak_of_a_sum_is_the_largest() -> None:
    assert (Cost("a", peak=3, programs=1) + Cost("b", peak=5, programs=2)) == Cost("a", peak=5, programs=3)
