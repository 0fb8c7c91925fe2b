"""Submits a jaxmed command to Slurm: one process per GPU, or per node where nodes have none.

python scripts/launch/slurm.py --nodes 2 --gpus 8 --time 12:00:00 -- jaxmed sweep --unit neuron --out /shared/runs/big
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from arguments import Parser, checked, need, resumed, run, show, with_env

OPTIONS = ("partition", "account", "qos", "constraint", "reservation")
"""Flags that go to sbatch as they are."""


def main() -> int:
    """Reads the flags, then prints or submits one batch script."""
    parser = Parser("A jaxmed command as a Slurm job.")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="of each node; one process drives each (default: one process per node)")
    parser.add_argument("--cpus", type=int, default=0, help="of each process")
    parser.add_argument("--time", default="", help="limit, as sbatch takes it, such as 12:00:00")
    parser.add_argument("--job-name", default="jaxmed")
    parser.add_argument("--warning", type=int, default=300, help="seconds before the limit at which the run is asked to end")
    for option in OPTIONS:
        parser.add_argument(f"--{option}", default="")
    flags, command = parser.read()
    for flag, value, least in (("--nodes", flags.nodes, 1), ("--gpus", flags.gpus, 0), ("--cpus", flags.cpus, 0)):
        need(rf"[{least}-9]\d*", flag, str(value), f"a whole number from {least}")
    need(r"[1-9]\d{0,4}", "--warning", str(flags.warning), "seconds, from 1 to 65535")
    need(r"(\d+-)?\d+(:\d+){0,2}|", "--time", flags.time, "minutes, H:M:S or D-H:M:S")
    for option in ("job_name", *OPTIONS):
        need(r"[\w.,:&|*\[\]-]*", f"--{option.replace('_', '-')}", getattr(flags, option), "what sbatch takes, without spaces")
    script = batch(flags, resumed(checked(command)))
    if flags.dry_run:
        show(["sbatch"], script)
        return 0
    return run(["sbatch"], script)


def batch(flags: argparse.Namespace, command: Sequence[str]) -> str:
    """The script that Slurm runs on the first node; srun starts the processes."""
    options = [f"job-name={flags.job_name}", f"nodes={flags.nodes}", f"ntasks-per-node={flags.gpus or 1}"]
    options += [f"gpus-per-node={flags.gpus}"] if flags.gpus else []
    options += [f"cpus-per-task={flags.cpus}"] if flags.cpus else []
    options += [f"time={flags.time}"] if flags.time else []
    options += [f"{option}={value}" for option in OPTIONS if (value := getattr(flags, option))]
    options += [f"output={flags.job_name}-%j.log", "open-mode=append", "requeue", f"signal=TERM@{flags.warning}"]
    place = [f"cd {shlex.quote(flags.workdir)} || exit 2"] if flags.workdir else []
    start = shlex.join(["srun", "--kill-on-bad-exit=1", *with_env(flags, command), "--hosts", "auto"])
    return "\n".join(["#!/bin/bash", *(f"#SBATCH --{option}" for option in options), *place, f"exec {start}", ""])


if __name__ == "__main__":
    sys.exit(main())
