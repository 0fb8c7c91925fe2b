"""Commands as processes of their own: ended by a signal at some moment, and run to their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

CODES = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}


def end_at(command: list[str], moments: Iterable[tuple[signal.Signals, Path]], patience: float = 400) -> None:
    """Starts a jaxmed command once per moment, and ends it by a signal as soon as a path is there."""
    for number, path in moments:
        child = _start(command)
        deadline = time.monotonic() + patience
        while not path.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(number)
        said, _ = child.communicate(timeout=120)
        assert child.returncode == CODES[number], said


def finish(command: list[str]) -> None:
    """Runs a jaxmed command to its end."""
    child = _start(command)
    said, _ = child.communicate()
    assert child.returncode == 0, said


def environment() -> dict[str, str]:
    """What a process needs to import this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def _start(command: list[str]) -> subprocess.Popen[str]:
    run = [sys.executable, "-m", "jaxmed.cli.main", *command]
    return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
