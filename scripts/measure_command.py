"""Runs a command, prints its wall time and peak memory, and fails where it needs more than it may.

python scripts/measure_command.py --most-gib 3 -- jaxmed demo
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time


def main() -> int:
    """Returns the command's exit code, or 1 where a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most-seconds", type=float, default=float("inf"), help="wall time the command may take")
    parser.add_argument("--most-gib", type=float, default=float("inf"), help="peak resident memory of its largest process, GiB")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    begun = time.perf_counter()
    code = subprocess.run(given.command[1:] if given.command[:1] == ["--"] else given.command).returncode
    seconds = time.perf_counter() - begun
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kibibytes on Linux
    print(f"{seconds:.1f} s, peak {gib:.2f} GiB")
    return code or int(seconds > given.most_seconds or gib > given.most_gib)


if __name__ == "__main__":
    sys.exit(main())
