"""SIGINT and SIGTERM, alike for every command: the first ends the run in order, the second at once.

The first raises `Interrupted` in the main thread and is remembered, so that a callback of a library that swallows the exception does not
lose it: loops over items call `check` after each. While a record is written (`delayed`) it is remembered alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user or the system asks the run to end.

    Attributes:
        number: of the signal.
        together: whether all of several processes end at this place.
    """

    def __init__(self, number: int, together: bool = False):
        super().__init__(signal.Signals(number).name)
        self.number, self.together = number, together


class _Signals:
    """What has come so far; one per process, as signals are."""

    received: int | None = None
    delays: int = 0
    expected: bool = False


def _handle(number: int, frame: FrameType | None) -> None:
    if _Signals.expected:
        _Signals.expected = False
        return
    if _Signals.received is not None:
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
        os._exit(128 + number)
    _Signals.received = number
    if not _Signals.delays:
        raise Interrupted(number)


@contextmanager
def handled() -> Iterator[None]:
    """Handles both signals inside the block. One that the process was started to ignore (`nohup`, `&` in scripts) stays ignored."""
    before = {}
    _Signals.received, _Signals.expected = None, False
    try:
        for number in HANDLED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _handle)
    except ValueError:  # not in the main thread: signals go elsewhere
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Signals.received = None


def check() -> None:
    """Raises `Interrupted` where a signal has come, whoever swallowed it before."""
    if _Signals.received is not None and not _Signals.delays:
        raise Interrupted(_Signals.received)


def asked() -> int:
    """The signal that has come, or 0."""
    return _Signals.received or 0


def end_together(number: int) -> None:
    """Raises `Interrupted` in all of several processes, for a signal that one of them was sent.

    Where the same signal is still on its way to this process, it is no second one, and changes nothing.
    """
    _Signals.expected = _Signals.received is None
    _Signals.received = _Signals.received or number
    raise Interrupted(number, together=True)


@contextmanager
def delayed() -> Iterator[None]:
    """A signal that comes inside the block is raised by the next `check`."""
    _Signals.delays += 1
    try:
        yield
    finally:
        _Signals.delays -= 1


def exit_code(error: KeyboardInterrupt) -> int:
    """130 after SIGINT, 143 after SIGTERM."""
    return 128 + getattr(error, "number", signal.SIGINT)
