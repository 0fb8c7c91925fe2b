"""The circuits of a run, from scores alone: of every curve its sizes, the one that is marked, and random ones of the same sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxmed.circuits.choice import RANKS, node_scores, random_edges, random_nodes, rewired, top_edges, top_nodes
from jaxmed.circuits.curve import FRACTIONS
from jaxmed.circuits.job import CircuitJob

ALL, NONE = "all edges", "no edges"
RANDOM, REWIRED = "random", "rewired"
"""Controls: any edges; and, of the first method's circuits by |score|, as many edges into every input, from any nodes before it."""
MARKED = "absolute"
"""The rank of the circuit that is marked."""


@dataclass(frozen=True)
class Circuit:
    """A circuit that is run.

    Attributes:
        method: of its scores; or `RANDOM`, `REWIRED`, `ALL` or `NONE`.
        rank: a key of `RANKS`; "" where there are no scores.
        draw: of controls, from 1; else 0.
        fraction: of all edges (nodes); NaN for the one of the marked size.
        count: edges (nodes) that were asked for.
        chosen: bool [U,Y], its edges.
    """

    method: str
    rank: str
    draw: int
    fraction: float
    count: int
    chosen: np.ndarray


@dataclass(frozen=True)
class Found:
    """What scoring has found.

    Attributes:
        sign: -1 where the outcome is lower in source than in base, on the mean of the pairs that are scored; else 1. Times it, scores
            are positive where edges support base's behaviour.
        edges, nodes: method -> scores [U,Y] and [U], in the outcome's sign: positive where source's value raises the outcome.
    """

    sign: float
    edges: dict[str, np.ndarray]
    nodes: dict[str, np.ndarray]


def sizes(job: CircuitJob) -> list[tuple[float, int]]:
    """(fraction, count) of every circuit of a curve but the whole; last that of the marked one."""
    return [*((fraction, int(fraction * job.items)) for fraction in FRACTIONS[:-1]), (float("nan"), job.spec.size)]


def circuits_of(job: CircuitJob, found: Found) -> list[Circuit]:
    """All circuits of a run, in the order of its files."""
    real, made = job.graph.real, []
    for method in job.methods:
        for rank in RANKS if job.ranked else ():
            wanted = [one for one in sizes(job) if rank == MARKED or np.isfinite(one[0])]
            made += [Circuit(method, rank, 0, fraction, count, _best(job, found, method, rank, count)) for fraction, count in wanted]
        if not job.ranked:
            made.append(Circuit(method, MARKED, 0, float("nan"), job.marked, job.given.chosen if job.given is not None else real))
    wired = [one for one in made if one.method == job.methods[0] and one.rank == MARKED] if job.rewires else []
    draw_one = random_nodes if job.spec.of_nodes and job.ranked else random_edges
    for draw in range(1, job.spec.random + 1):
        seed = [job.spec.seed, draw]
        for fraction, count in sizes(job):
            count = count if np.isfinite(fraction) else job.marked
            made.append(Circuit(RANDOM, "", draw, fraction, count, draw_one(job.graph, count, np.random.default_rng(seed))))
        drawn = [rewired(job.graph, one.chosen, np.random.default_rng([*seed, 1])) for one in wired]
        made += [Circuit(REWIRED, "", draw, one.fraction, one.count, chosen) for one, chosen in zip(wired, drawn, strict=True)]
    return [Circuit(ALL, "", 0, 1.0, job.items, real), Circuit(NONE, "", 0, 0.0, 0, np.zeros_like(real)), *made]


def _best(job: CircuitJob, found: Found, method: str, rank: str, count: int) -> np.ndarray:
    if job.spec.of_nodes:
        return top_nodes(job.graph, found.sign * found.nodes[method], count, rank)
    return top_edges(job.graph, found.sign * found.edges[method], count, rank)


def found_of(job: CircuitJob, ends: np.ndarray, edges: dict[str, np.ndarray]) -> Found:
    """What was found, from outcomes [2, pair] of base and source and the mean scores of edges."""
    sign = -1.0 if np.mean(ends[1] - ends[0]) < 0 else 1.0
    if job.given is None:
        return Found(sign, edges, {method: node_scores(job.graph, scores) for method, scores in edges.items()})
    scores, held = job.given.edges, job.given.nodes
    nodes = held if np.isfinite(held).all() else node_scores(job.graph, scores)
    return Found(sign, dict.fromkeys(job.methods, sign * scores), dict.fromkeys(job.methods, sign * nodes))
