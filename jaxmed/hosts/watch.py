"""A limit of time while processes wait for each other: the library that waits hears no signal, and aborts the process where it fails."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

OVER = b"\0"
LOOKS_EVERY = 0.5
"""Seconds."""
ESTABLISHED = "01"
"""In the kernel's tables of connections."""


@contextmanager
def limited(seconds: float, look: Callable[[], None], told: Callable[[], str]) -> Iterator[None]:
    """Ends the process where the block takes longer: a message on stderr, exit code 2. A signal ends it at once, with 130 or 143.

    Args:
        seconds: how long the block may take.
        look: called now and then, in another thread.
        told: makes the message.
    """
    reads, writes = socket.socketpair()
    writes.setblocking(False)
    before = None
    with suppress(ValueError):  # not in the main thread: signals go elsewhere
        before = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
    thread = Thread(target=_wait, args=(reads, seconds, look, told), daemon=True)
    thread.start()
    try:
        yield
    finally:
        if before is not None:
            signal.set_wakeup_fd(before)
        writes.send(OVER)
        thread.join()
        reads.close()
        writes.close()


def _wait(reads: socket.socket, seconds: float, look: Callable[[], None], told: Callable[[], str]) -> None:
    """In a thread of its own: until the block is over, a signal comes (Python writes its number), or time is."""
    last = time.monotonic() + seconds
    while (left := last - time.monotonic()) > 0:
        if select.select([reads], [], [], min(left, LOOKS_EVERY))[0]:
            if (came := reads.recv(1)) == OVER:
                return
            if came[0] in (signal.SIGINT, signal.SIGTERM):
                _end(f"interrupted by {signal.Signals(came[0]).name}.", 128 + came[0])
        look()
    _end(told(), 2)


def _end(message: str, code: int) -> None:
    print(f"jaxmed: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def connections(port: int) -> int:
    """How many connections to a port of this machine there are; 0 where the kernel does not say."""
    tables = [path for name in ("tcp", "tcp6") if (path := Path("/proc/net") / name).is_file()]
    rows = [line.split() for path in tables for line in path.read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == ESTABLISHED for row in rows)


def answers(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True
