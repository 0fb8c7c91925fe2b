"""Runs a jaxmed command on several hosts by plain SSH, one process on each, and waits for all of them.

python scripts/launch/ssh.py --hosts node0,node1 --workdir /shared -- jaxmed sweep --unit neuron --out runs/big

Keys must let this machine in without a password. Ctrl-C and SIGTERM go to all processes, which end in order; once more ends them at once.
Where one process fails, or the connection to it breaks, the others are asked to end, and are ended where --grace seconds do not suffice.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from arguments import Parser, checked, need, refuse, show, with_env

REMOTE = (
    "exec 3<&0; ( while read -r name <&3; do kill -s $name $$; done; kill -s TERM $$ ) >/dev/null 2>&1 & "
    'exec 3<&-; cd "$1" && shift && exec "$@" </dev/null'
)
"""What sh runs on a host: names of signals come as lines, and the end of the connection counts as TERM. $$ is then the command itself."""
ORDERLY = (130, 143)
"""Exit codes of a run that was asked to end, and did."""
STEPS = ("TERM", "TERM", "KILL", "")
"""What is sent to those that are left, --grace seconds after each other: jaxmed ends in order at the first, and at once at the second.
At last connections are cut."""


def main() -> int:
    """Reads the flags, then prints or runs one ssh command per host."""
    parser = Parser("A jaxmed command on several hosts, by plain SSH.")
    parser.add_argument("--hosts", required=True, help="HOST,HOST,... or USER@HOST,...; the first is process 0. One may come twice")
    parser.add_argument("--address", default="", help="of the first host, as the others reach it; default: its name")
    parser.add_argument("--port", type=int, default=8476, help="of process 0; it must be free")
    parser.add_argument("--grace", type=float, default=30, help="seconds that processes have after another one has failed")
    flags, command = parser.read()
    hosts = flags.hosts.split(",")
    for host in hosts:
        need(r"([\w.-]+@)?[A-Za-z0-9]([\w.-]*\w)?", "--hosts", host, "names of hosts, with commas between them")
    need(r"([A-Za-z0-9]([\w.-]*\w)?)?", "--address", flags.address, "a name or an IPv4 address")
    if not 0 < flags.port < 65536 or not flags.grace >= 0:
        refuse(f"--port {flags.port} --grace {flags.grace:g}: give a port from 1 to 65535, and seconds from 0.")
    lines = commands(flags, hosts, checked(command))
    if flags.dry_run:
        for words in lines:
            show(words)
        return 0
    return Processes(hosts, lines, flags.grace).wait()


def commands(flags: argparse.Namespace, hosts: Sequence[str], command: Sequence[str]) -> list[list[str]]:
    """The words of ssh for every host."""
    first = flags.address or hosts[0].rpartition("@")[2]
    found = []
    for number, host in enumerate(hosts):
        start = [*with_env(flags, command), "--hosts", f"{first}:{flags.port},{len(hosts)},{number}"]
        remote = shlex.join(["sh", "-c", REMOTE, "sh", flags.workdir or ".", *start])
        found.append(["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", host, remote])
    return found


class Processes:
    """The ssh processes of a run.

    Attributes:
        hosts: where each runs.
        children: theirs here; a line on stdin is the name of a signal.
        asked: the signals that this process was sent, as names; later ones last.
    """

    def __init__(self, hosts: Sequence[str], lines: Sequence[Sequence[str]], grace: float):
        self.hosts, self.grace, self.asked, self.children = hosts, grace, [], []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda came, _: self.asked.append(signal.Signals(came).name.removeprefix("SIG")))
        try:
            for words in lines:  # sessions of their own, so that Ctrl-C comes to this process alone
                self.children.append(subprocess.Popen(words, stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True))
        except FileNotFoundError:
            refuse("ssh is not installed here, or not on PATH. --dry-run shows what would be run.")

    def wait(self) -> int:
        """Returns when all have ended: 0, or the exit code of the first that failed.

        A process that ends otherwise than the rest gets the others asked to end, then told.
        """
        first, told, sent, deadlines = 0, set(), 0, []
        while len(told) < len(self.children):
            for number, child in enumerate(self.children):
                if number not in told and child.poll() is not None:
                    told.add(number)
                    first = first or child.returncode
                    self._tell(number, child.returncode)
                    if child.returncode and not deadlines:
                        deadlines = self._deadlines(child.returncode)
            for name in self.asked[sent:]:
                self._send(name)
                sent += 1
            if deadlines and time.monotonic() > deadlines[0][0]:
                self._end(deadlines.pop(0)[1])
            time.sleep(0.05)
        return first if first >= 0 else 128 - first

    def _deadlines(self, code: int) -> list[tuple[float, str]]:
        """When the others get which signal. After an orderly end they may come to theirs first."""
        begin = time.monotonic() + (self.grace if code in ORDERLY else 0)
        return [(begin + self.grace * number, name) for number, name in enumerate(STEPS)]

    def _tell(self, number: int, code: int) -> None:
        why = (
            "ended in order"
            if code in ORDERLY
            else "the connection failed, or it was ended by a signal"
            if code == 255
            else f"failed with exit code {code}"
        )
        if code:
            print(f"ssh.py: process {number} on {self.hosts[number]}: {why}.", file=sys.stderr)

    def _send(self, name: str) -> None:
        for child in self.children:
            if child.poll() is None and child.stdin is not None:
                try:
                    child.stdin.write(f"{name}\n")
                except OSError:  # it ends just now
                    continue

    def _end(self, name: str) -> None:
        """Sends a signal to those that are left, or, without a name, ends their connections."""
        left = [number for number, child in enumerate(self.children) if child.poll() is None]
        if not left:
            return
        does = f"sends SIG{name} to" if name else "cuts the connection to"
        print(f"ssh.py: {does} process {', '.join(map(str, left))}.", file=sys.stderr)
        if name:
            self._send(name)
        for child in () if name else self.children:
            child.kill()


if __name__ == "__main__":
    sys.exit(main())
