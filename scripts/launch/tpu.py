"""Runs a jaxmed command on every host of a Cloud TPU slice, by gcloud.

python scripts/launch/tpu.py --name my-slice --zone us-east5-a --workdir /shared -- jaxmed sweep --unit neuron --out runs/big
python scripts/launch/tpu.py --name my-slice --zone us-east5-a --signal TERM     # an orderly end, in all of its processes
"""

from __future__ import annotations

import shlex
import sys

from arguments import NAME, Parser, checked, need, refuse, run, show, with_env

PID = "/tmp/jaxmed-$USER.pid"
"""Where every host keeps the number of its process."""


def main() -> int:
    """Reads the flags, then prints or runs one gcloud command."""
    parser = Parser("A jaxmed command on every host of a Cloud TPU slice.")
    parser.add_argument("--name", required=True, help="the slice")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="default: that of gcloud's configuration")
    parser.add_argument("--internal-ip", action="store_true", help="connects by internal addresses")
    parser.add_argument("--signal", choices=("INT", "TERM"), help="in place of a command: a signal for the one that runs")
    flags, command = parser.read()
    for flag, value in (("--name", flags.name), ("--zone", flags.zone), ("--project", flags.project or "a")):
        need(NAME, flag, value, "lower-case letters, digits and hyphens, as gcloud has it")
    if flags.signal and command:
        refuse("--signal is for the command that runs: give no other.")
    words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", flags.name, f"--zone={flags.zone}", "--worker=all"]
    words += [f"--project={flags.project}"] if flags.project else []
    words += ["--internal-ip"] if flags.internal_ip else []
    if flags.signal:
        remote = f'pid=$(cat {PID}) && grep -q jaxmed /proc/$pid/cmdline && kill -s {flags.signal} "$pid"'
    else:
        start = [*with_env(flags, checked(command)), "--hosts", "auto"]
        place = f"cd {shlex.quote(flags.workdir)} && " if flags.workdir else ""
        remote = f"{place}echo $$ >{PID} && exec {shlex.join(start)}"
    words.append(f"--command={remote}")
    if flags.dry_run:
        show(words)
        return 0
    return run(words)


if __name__ == "__main__":
    sys.exit(main())
