"""Scores and circuits as JSON, in the format of the Mechanistic Interpretability Benchmark (circuit track) and the EAP-IG library.

{"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
 "nodes": {"a0.h1": {"in_graph": true, "score": 0.2}, ..., "logits": {"in_graph": true}},
 "edges": {"input->a0.h1<q>": {"score": 0.1, "in_graph": true}, ...}}

A score there is positive where corrupting the edge harms the clean run's behaviour: where source's value moves the outcome from base's
towards source's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.circuits.graph import LOGITS, Graph, check_graph, connected, graph_from
from jaxmed.errors import UserError, all_problems, quoted
from jaxmed.files import is_number, read_json, write_text


@dataclass(frozen=True)
class Scored:
    """Scores of a graph's edges, and a circuit among them.

    Attributes:
        edges: float64 [U,Y], in the benchmark's sign; NaN where a file gives none.
        nodes: float64 [U]; NaN where a file gives none.
        chosen: bool [U,Y], the circuit's edges.
    """

    graph: Graph
    edges: np.ndarray
    nodes: np.ndarray
    chosen: np.ndarray

    def ranked(self, of_nodes: bool) -> bool:
        """Whether every edge has a score; of nodes, whether every node has one, or every edge."""
        edges = bool(np.isfinite(self.edges[self.graph.real]).all())
        return edges or (of_nodes and bool(np.isfinite(self.nodes).all()))


def write_scores(file: Path, scored: Scored) -> None:
    """Writes scores as the benchmark reads them: every edge and node, and whether the circuit holds it.

    The circuit is what is left of `chosen` on ways from the input to the logits, as in that library.
    """
    graph, kept = scored.graph, connected(scored.graph, scored.chosen)
    nodes: dict[str, dict[str, Any]] = {name: {"in_graph": bool(kept[at].any())} for at, name in enumerate(graph.senders)}
    for name, score in zip(graph.senders, scored.nodes.tolist(), strict=True):
        if np.isfinite(score):
            nodes[name]["score"] = score
    nodes[LOGITS] = {"in_graph": True}
    at = tuple(graph.places.T)
    held = zip(graph.edges, scored.edges[at].tolist(), kept[at].tolist(), strict=True)
    edges = {name: {**({"score": score} if np.isfinite(score) else {}), "in_graph": inside} for name, score, inside in held}
    write_text(file, json.dumps({"cfg": graph.config, "nodes": nodes, "edges": edges}, allow_nan=False))


def read_scores(file: str | Path, graph: Graph | None = None) -> Scored:
    """Scores, or the circuit, of a file of the benchmark. What a file leaves out of its nodes and edges is in no circuit.

    Args:
        graph: of the model that they should be of.

    Raises:
        UserError: a file that cannot be read, is of another graph, or has other keys, names or values; all of them together.
    """
    file = Path(file)
    held = read_json(file, "scores in the benchmark's format")
    if not isinstance(held, dict) or not all(isinstance(held.get(key), dict) for key in ("cfg", "nodes", "edges")):
        raise UserError(
            f"{file} needs the keys 'cfg', 'nodes' and 'edges', each with a mapping, as the benchmark's circuit track has them."
        )
    graph, problems = check_graph(graph_from(held["cfg"]), graph), list[str]()
    places = {name: tuple(place) for name, place in zip(graph.edges, graph.places.tolist(), strict=True)}
    edges, chosen = np.full(graph.real.shape, np.nan), np.zeros_like(graph.real)
    for name, entry in _entries(held["edges"], places, "edge", problems):
        edges[places[name]], chosen[places[name]] = entry
    numbers = {name: at for at, name in enumerate(graph.senders)}
    nodes = np.full(len(numbers), np.nan)
    for name, (score, _) in _entries({k: v for k, v in held["nodes"].items() if k != LOGITS}, numbers, "node", problems):
        nodes[numbers[name]] = score
    if problems:
        raise all_problems(f"{file} does not fit its 'cfg' ({graph.layers} layers, {graph.heads} heads)", problems)
    return Scored(graph, edges, nodes, chosen)


def _entries(held: Mapping[str, Any], known: Mapping[str, Any], what: str, problems: list[str]) -> list[tuple[str, tuple[float, bool]]]:
    """(name, (score or NaN, in_graph)) of every entry; what is wrong with the others goes to `problems`."""
    found = []
    for name, entry in held.items():
        if name not in known:
            problems.append(f"{what} {quoted(name)}: there is none of that name")
            continue
        entry = entry if isinstance(entry, dict) else {"in_graph": entry}
        score, inside = entry.get("score"), entry.get("in_graph", False)
        if not isinstance(inside, bool) or not (score is None or is_number(score)):
            problems.append(f"{what} {quoted(name)}: {quoted(entry)} needs a finite number 'score', or true or false as 'in_graph'")
            continue
        found.append((name, (np.nan if score is None else float(score), inside)))
    return found
