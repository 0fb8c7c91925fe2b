"""Which edges a circuit has: the best ones by score, those between the best nodes, or random ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxmed.circuits.graph import LOGITS, Graph
from jaxmed.errors import UserError, unknown

RANKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"signed": lambda scores: scores, "absolute": np.abs}
"""What edges are ranked by. Signed: edges that support base's behaviour first, those against it last. Absolute: both kinds alike."""


def node_scores(graph: Graph, scores: np.ndarray) -> np.ndarray:
    """Scores [U] of nodes from those of edges [U,Y]: what a node changes times the gradient of the outcome in all that it writes is the sum
    over its edges."""
    return np.where(graph.real, scores, 0.0).sum(-1)


def top_edges(graph: Graph, scores: np.ndarray, count: int, rank: str = "absolute") -> np.ndarray:
    """The `count` best edges, bool [U,Y]; of equal ones those that come first in the graph's order.

    Args:
        scores: float [U,Y], positive where an edge supports base's behaviour.
        rank: a key of `RANKS`.

    Raises:
        UserError: an unknown rank; more edges than there are.
    """
    _check(count, len(graph.places), "edges", rank)
    at = tuple(graph.places.T)
    return _marked(graph, graph.places[_best(RANKS[rank](scores[at]), count)])


def top_nodes(graph: Graph, scores: np.ndarray, count: int, rank: str = "absolute") -> np.ndarray:
    """All edges between the `count` best nodes, and from them to the logits, bool [U,Y].

    Args:
        scores: float [U], of nodes.

    Raises:
        UserError: an unknown rank; more nodes than there are.
    """
    _check(count, len(graph.senders), "nodes", rank)
    return between(graph, _best(RANKS[rank](scores), count))


def between(graph: Graph, nodes: np.ndarray) -> np.ndarray:
    """All edges between nodes, given by number, and from them to the logits, bool [U,Y]."""
    chosen = np.zeros(len(graph.senders), bool)
    chosen[nodes] = True
    reads: np.ndarray = np.any(chosen[:, None] & graph.own, axis=0)
    reads[graph.receivers.index(LOGITS)] = True
    return graph.real & chosen[:, None] & reads[None]


def random_edges(graph: Graph, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` edges, any as likely as another, bool [U,Y]."""
    return _marked(graph, graph.places[rng.permutation(len(graph.places))[:count]])


def rewired(graph: Graph, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A circuit whose every input reads as many edges as in `chosen`, from any of the nodes before it, bool [U,Y]."""
    drawn = np.where(graph.real, rng.random(graph.real.shape), np.inf)
    place = np.argsort(np.argsort(drawn, axis=0, kind="stable"), axis=0, kind="stable")
    return graph.real & (place < (chosen & graph.real).sum(axis=0))


def random_nodes(graph: Graph, count: int, rng: np.random.Generator) -> np.ndarray:
    """All edges between the input and `count` - 1 other nodes, any as likely as another, bool [U,Y]."""
    return between(graph, np.concatenate([[0], 1 + rng.permutation(len(graph.senders) - 1)])[:count])


def _check(count: int, most: int, what: str, rank: str) -> None:
    if rank not in RANKS:
        raise unknown("rank", rank, RANKS)
    if not 0 <= count <= most:
        raise UserError(f"{count} {what} are asked for; this model has {most:,}. Give 0 to {most:,}.")


def _best(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-values, kind="stable")[:count]


def _marked(graph: Graph, places: np.ndarray) -> np.ndarray:
    chosen = np.zeros_like(graph.real)
    chosen[tuple(places.T)] = True
    return chosen
