"""The beginning: processes that come together."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jaxmed.errors import UserError, notice
from jaxmed.hosts.exchange import Joined
from jaxmed.hosts.found import find_cluster, idle_gpus, why_none
from jaxmed.hosts.state import state
from jaxmed.hosts.watch import answers, connections, limited

AUTO, HOSTS = "auto", "--hosts"
OWN_NUMBER = re.compile(r"(:\d+,\d+),\d+$")
SECONDS_TO_JOIN, SECONDS_SILENT = 300, 60
"""How long processes wait for each other at the beginning, and how long one may be silent before the others end."""
SPARE = 3600
"""Seconds by which JAX's own limit lies behind ours: where it is reached, JAX aborts the process."""


def join(hosts: str, seconds: int = SECONDS_TO_JOIN) -> str:
    """Makes this process one of several, before JAX's backend starts. All of them run the same command on one mesh of all devices.

    Args:
        hosts: "auto" where Slurm, Kubernetes, Open MPI or Cloud TPU say who takes part; or HOST:PORT,COUNT,NUMBER: the address of process
            0, how many there are, and which this one is; empty: it is alone.
        seconds: how long it waits for the others. Then it ends, with exit code 2, and says how many came.

    Returns:
        What was found, in words; empty for a process alone.

    Raises:
        UserError: another word; numbers that make no sense; nothing that says who takes part; processes that cannot come together.
    """
    if not hosts or Joined.many:
        return ""
    given = _given(hosts)
    if seconds < 1:
        raise UserError(f"--hosts-wait {seconds}: give seconds, from 1.")
    import jax

    from jaxmed.distributed import use_all_cores

    use_all_cores()
    if jax.config.values.get("jax_cpu_collectives_implementation") is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    try:
        came = [0]
        with limited(seconds, lambda: _count(came), lambda: _missing(hosts, seconds, max(came))), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what JAX does not find; `why_none` says it
            limits: dict[str, Any] = {"initialization_timeout": seconds + SPARE, "heartbeat_timeout_seconds": SECONDS_SILENT}
            jax.distributed.initialize(**given, **limits)
    except Exception as error:
        raise _failed(hosts, error) from None
    Joined.many = jax.process_count() > 1
    return _told(hosts)


def _given(hosts: str) -> dict[str, Any]:
    """What jax.distributed is told; nothing where it finds out by itself."""
    if hosts == AUTO:
        return {}
    address, count, number = (*hosts.split(","), "", "")[:3]
    if ":" not in address or not (count.isdecimal() and number.isdecimal()) or not int(number) < int(count) or hosts.count(",") != 2:
        raise UserError(f"--hosts {hosts!r}: give auto, or HOST:PORT,COUNT,NUMBER such as node0:8476,4,0 with numbers from 0.")
    given = {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
    return {**given, "cluster_detection_method": "deactivate"}


def for_all(arguments: Sequence[str]) -> list[str]:
    """A command line as all processes take it: in HOST:PORT,COUNT,NUMBER the word NUMBER stands for each one's own."""
    return [
        OWN_NUMBER.sub(r"\1,NUMBER", one) if HOSTS in (one.split("=")[0], before) else one for before, one in pairwise(["", *arguments])
    ]


def _told(hosts: str) -> str:
    """Which processes came together, and who said so."""
    known = state()
    if hosts == AUTO and (told := idle_gpus(os.environ)):
        notice(told)
    who = find_cluster(os.environ) or "the metadata server of Cloud TPU"
    said = f"--hosts auto: {who} says who takes part. " if hosts == AUTO else ""
    return f"{said}This is process {known.process_id} of {known.num_processes}; process 0 is at {known.coordinator_address}."


def _failed(hosts: str, error: Exception) -> UserError:
    """The error of processes that do not come together."""
    if hosts == AUTO and state().coordinator_address is None and isinstance(error, ValueError):
        return UserError(f"--hosts auto: {why_none(os.environ)}")
    told = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return UserError(f"--hosts {hosts}: the processes did not come together ({told}). Start all of them, each with its number.")


def _count(came: list[int]) -> None:
    """Counts, in process 0, who is here: each holds a connection to it until it gives up."""
    known = state()
    if known.coordinator_address is not None and known.process_id == 0:
        came.append(min(connections(int(known.coordinator_address.rpartition(":")[2])), known.num_processes - 1))


def _missing(hosts: str, seconds: int, came: int) -> str:
    """The message of a process that has waited in vain."""
    known = state()
    address, count = known.coordinator_address, known.num_processes
    fix = "Nothing was written. Start all of them within --hosts-wait seconds."
    if address is None:
        return f"--hosts {hosts}: {find_cluster(os.environ) or 'the cluster'} did not say within {seconds} s where process 0 is. {fix}"
    if known.process_id:
        told = f"is at {address}, and says how many came" if answers(address) else f"does not answer at {address}"
        return f"--hosts {hosts}: not all of {count} processes came within {seconds} s. Process 0 {told}. {fix}"
    told = f"{came or 'not all'} of {count} processes came to {address} within {seconds} s"
    return f"--hosts {hosts}: {told}. {fix}"
