"""The graph of a decoder: nodes that write into the residual stream, inputs that read it, and the edges between them.

Names and orders are those of the EAP-IG library (Hanna et al. 2024, arXiv 2403.17806) and of the circuit track of the Mechanistic
Interpretability Benchmark (Mueller et al. 2025, arXiv 2504.13151). Senders: "input" (the embedding), "a3.h1" (a head), "m3" (an MLP).
Receivers: "a3.h1<q>", "a3.h1<k>", "a3.h1<v>", "m3", "logits". With grouped queries every query head has key and value inputs of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxmed.errors import UserError, hint, quoted
from jaxmed.files import is_number
from jaxmed.models.config import ModelConfig

INPUT, LOGITS, LETTERS = "input", "logits", "qkv"
LARGEST, MOST = 2**31, 2**27
"""Sizes that no model reaches, and senders times receivers that memory holds names of; 70 billion parameters have 80 million."""
EXAMPLES = "Edges are named as input->a0.h1<q>, a0.h1->m0, m0->logits, from a node to one that comes later."


@dataclass(frozen=True)
class Graph:
    """The nodes and edges of a decoder without parallel blocks.

    Attributes:
        layers, heads, width: L, N and D.
    """

    layers: int
    heads: int
    width: int

    @property
    def per_layer(self) -> int:
        """Receivers of a layer: three inputs of every head, and the MLP's."""
        return len(LETTERS) * self.heads + 1

    @property
    def size(self) -> int:
        """Senders times receivers."""
        return (1 + self.layers * (self.heads + 1)) * (self.layers * self.per_layer + 1)

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """Names of the U = 1 + L (N + 1) nodes that write: the embedding, then layer by layer the heads and the MLP."""
        return (INPUT, *(name for layer in range(self.layers) for name in (*self._heads(layer), f"m{layer}")))

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """Names of the L (3 N + 1) + 1 inputs: of every layer, its heads' queries, keys and values, and its MLP's; last the logits."""
        every = (
            name
            for layer in range(self.layers)
            for name in (*(f"{head}<{letter}>" for letter in LETTERS for head in self._heads(layer)), f"m{layer}")
        )
        return (*every, LOGITS)

    @cached_property
    def real(self) -> np.ndarray:
        """bool [senders, receivers]: whether the sender writes before the receiver reads."""
        before = np.zeros((len(self.senders), len(self.receivers)), bool)
        for layer in range(self.layers):
            column, written = layer * self.per_layer, 1 + layer * (self.heads + 1)
            before[:written, column : column + self.per_layer] = True
            before[written : written + self.heads, column + self.per_layer - 1] = True
        before[:, -1] = True
        return before

    @cached_property
    def places(self) -> np.ndarray:
        """int [E, 2], (sender, receiver) of every edge, in the order of the benchmark's files."""
        found: list[tuple[int, int]] = []
        for layer in range(self.layers):
            column, written = layer * self.per_layer, 1 + layer * (self.heads + 1)
            inputs = [column + letter * self.heads + head for head in range(self.heads) for letter in range(len(LETTERS))]
            found += [(sender, receiver) for sender in range(written) for receiver in inputs]
            found += [(sender, column + self.per_layer - 1) for sender in range(written + self.heads)]
        return np.asarray(found + [(sender, len(self.receivers) - 1) for sender in range(len(self.senders))])

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of the edges, such as "m0->a1.h2<q>", in the order of `places`."""
        return tuple(f"{self.senders[sender]}->{self.receivers[receiver]}" for sender, receiver in self.places.tolist())

    @cached_property
    def own(self) -> np.ndarray:
        """bool [senders, receivers]: whether the receiver is an input of the same node."""
        found = np.zeros((len(self.senders), len(self.receivers)), bool)
        for layer in range(self.layers):
            column, written = layer * self.per_layer, 1 + layer * (self.heads + 1)
            for head in range(self.heads):
                found[written + head, [column + letter * self.heads + head for letter in range(len(LETTERS))]] = True
            found[written + self.heads, column + self.per_layer - 1] = True
        return found

    def marked(self, edges: Iterable[str]) -> np.ndarray:
        """The edges of these names, bool [senders, receivers].

        Raises:
            UserError: a name of no edge.
        """
        numbers, chosen = {name: at for at, name in enumerate(self.edges)}, np.zeros_like(self.real)
        for name in edges:
            if name not in numbers:
                raise UserError(f"There is no edge {quoted(name)} in this graph. {EXAMPLES}{hint(name, self.edges)}")
            chosen[tuple(self.places[numbers[name]])] = True
        return chosen

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes: the senders and the logits."""
        return (*self.senders, LOGITS)

    @property
    def config(self) -> dict[str, Any]:
        """What the benchmark's files say of a model."""
        return {"n_layers": self.layers, "n_heads": self.heads, "parallel_attn_mlp": False, "d_model": self.width}

    def _heads(self, layer: int) -> list[str]:
        return [f"a{layer}.h{head}" for head in range(self.heads)]


def graph_of(config: ModelConfig) -> Graph:
    """The graph of a model.

    Raises:
        UserError: a model whose residual stream is no sum of what its nodes write.
    """
    refused = {
        "norms what attention and MLP write before it is added (a post-norm), so that heads do not add up": config.post_norm,
        "has no norm before attention and MLP": not config.pre_norm,
        "norms the queries of all heads together, so that heads have no inputs of their own": config.query_key_norm == "all",
    }
    for why, holds in refused.items():
        if holds:
            raise UserError(f"Circuits of a {config.family} model are not defined here: it {why}. Use a model with pre-norm blocks alone.")
    return _small_enough(Graph(config.layers, config.heads, config.width))


def _small_enough(graph: Graph) -> Graph:
    if graph.size > MOST:
        told = f"{graph.layers} layers of {graph.heads} heads have {graph.size:,} places of edges"
        raise UserError(f"{told}; circuits are found among {MOST:,} at most. Use a smaller model.")
    return graph


def graph_from(config: Mapping[str, Any]) -> Graph:
    """The graph that a file of the benchmark says its scores are of.

    Raises:
        UserError: numbers missing, or parallel blocks.
    """
    sizes: dict[str, Any] = {name: config.get(name) for name in ("n_layers", "n_heads", "d_model")}
    if wrong := [name for name, size in sizes.items() if not is_number(size) or size != int(size) or not 1 <= size < LARGEST]:
        told = ", ".join(f"{name} {quoted(sizes[name])}" for name in wrong)
        raise UserError(f"'cfg' says {told}; n_layers, n_heads and d_model are whole numbers from 1 to {LARGEST - 1:,}.")
    graph = _small_enough(Graph(*map(int, sizes.values())))
    if config.get("parallel_attn_mlp"):
        raise UserError("'cfg' says parallel_attn_mlp, and no model here has parallel blocks. Give scores of a model without them.")
    return graph


def check_graph(graph: Graph, wanted: Graph | None) -> Graph:
    """The graph of scores; a UserError where it is not the one that they should be of."""
    if wanted is not None and graph != wanted:
        raise UserError(f"The scores are of a model with {graph.config}; this one has {wanted.config}. Give scores of this model.")
    return graph


def connected(graph: Graph, chosen: np.ndarray) -> np.ndarray:
    """Of the chosen edges bool [senders, receivers], those that lie on a way from the input to the logits.

    The others change nothing: what they carry is the other run's value, or is read by nobody.
    """
    left, own = chosen & graph.real, graph.own.astype(np.int32)
    while True:
        reached = (left.any(0).astype(np.int32) @ own.T > 0) | (np.arange(len(own)) == 0)
        read = left.any(1)
        alive = reached & read
        used = (alive.astype(np.int32) @ own > 0) | (np.arange(left.shape[1]) == left.shape[1] - 1)
        after = left & alive[:, None] & used[None]
        if (after == left).all():
            return left
        left = after
