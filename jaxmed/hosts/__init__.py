"""Several processes that run one program on the devices of all of them. A process alone needs no JAX to know that it is alone."""

from jaxmed.hosts.exchange import REFUSED, agree, first_tells, leads, own_mesh, own_part, several, to_host, told_to_end, wait_for_all
from jaxmed.hosts.join import AUTO, SECONDS_TO_JOIN, for_all, join

__all__ = [
    "AUTO",
    "REFUSED",
    "SECONDS_TO_JOIN",
    "agree",
    "first_tells",
    "for_all",
    "join",
    "leads",
    "own_mesh",
    "own_part",
    "several",
    "to_host",
    "told_to_end",
    "wait_for_all",
]
