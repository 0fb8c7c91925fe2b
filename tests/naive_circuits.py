"""The oracle of circuits: a decoder written out in PyTorch, head by head, an input for each head's queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from jaxmed.circuits.graph import Graph
from jaxmed.models.model import Model

Tensor = torch.Tensor


class Decoder:
    """A tiny pre-norm model in float64. Every edge is a term of a sum; nothing is batched."""

    def __init__(self, model: Model):
        self.config = model.config
        self.params = {name: value for name, value in model.params.items() if name != "blocks"}
        self.blocks = model.params["blocks"]

    def get(self, name: str, layer: int | None = None) -> Tensor:
        array = self.params[name] if layer is None else self.blocks[name][layer]
        return torch.tensor(np.asarray(array, np.float64))

    def norm(self, x: Tensor, scale: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.norm_eps) * (scale + self.config.norm_offset)

    def embed(self, tokens: Any) -> Tensor:
        return self.get("embedding")[torch.tensor(np.asarray(tokens, np.int64))]

    def rotate(self, x: Tensor) -> Tensor:
        assert self.config.rope is not None
        half = x.shape[-1] // 2
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] / self.config.rope.base ** (torch.arange(half) / half)[None]
        first, second = x[:, :half], x[:, half:]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)

    def head(self, layer: int, head: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """What a head writes [T,D] for the inputs of its query, key and value [T,D]."""
        config, group = self.config, head // self.config.group
        rows = {"q": head % config.group, "k": config.group, "v": config.group + 1}
        made = {}
        for letter, row in rows.items():
            made[letter] = self.norm(inputs[letter], self.get("attention_norm", layer)) @ self.get("qkv", layer)[:, group, row]
            if config.qkv_bias:
                made[letter] = made[letter] + self.get("qkv_bias", layer)[group, row]
        scores = self.rotate(made["q"]) @ self.rotate(made["k"]).T / config.head_width**0.5
        at = torch.arange(len(scores))
        window = 2**30 if config.windows is None else config.windows[layer]
        hidden = (at[None] > at[:, None]) | (at[:, None] - at[None] >= window)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ made["v"] @ self.get("out", layer)[head]

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        config = self.config
        branches = torch.einsum("td,dcf->tcf", self.norm(x, self.get("mlp_norm", layer)), self.get("gate_up", layer))
        branches = branches + self.get("gate_up_bias", layer) if config.mlp_bias else branches
        act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[config.activation]
        neuron = act(branches[:, 0]) * branches[:, 1] if config.gated else act(branches[:, 0])
        out = neuron @ self.get("down", layer)
        return out + self.get("down_bias", layer) if config.mlp_bias else out

    def logits(self, x: Tensor) -> Tensor:
        """After the last token."""
        return self.norm(x, self.get("final_norm"))[-1] @ self.get("head").T

    def run(self, embedded: Tensor, read: Callable[[str, dict[str, Tensor], Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """What every node writes, and the logits.

        Args:
            read: (receiver, what every earlier node writes, the biases of attention so far) -> the receiver's input.
        """
        config, written = self.config, {"input": embedded}
        biases = torch.zeros(config.width, dtype=torch.float64)
        for layer in range(config.layers):
            names = [f"a{layer}.h{head}" for head in range(config.heads)]
            earlier = dict(written)
            for number, name in enumerate(names):
                inputs = {letter: read(f"{name}<{letter}>", earlier, biases) for letter in "qkv"}
                written[name] = self.head(layer, number, inputs)
            biases = biases + self.get("out_bias", layer) if config.out_bias else biases
            written[f"m{layer}"] = self.mlp(layer, read(f"m{layer}", dict(written), biases))
        return written, self.logits(read("logits", dict(written), biases))


def _total(written: Mapping[str, Tensor], biases: Tensor) -> Tensor:
    return sum(written.values(), biases)  # type: ignore[return-value]


class Naive:
    """A pair's scores and circuits by loops."""

    def __init__(self, model: Model, base: Any, source: Any, target: int, foil: int):
        self.decoder = Decoder(model)
        self.base, self.source = (self.decoder.embed(tokens) for tokens in (base, source))
        self.read = lambda logits: logits[target] - logits[foil]

    @cached_property
    def ends(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What every node writes in base and in source."""
        base, source = (self.decoder.run(x, lambda _, written, biases: _total(written, biases))[0] for x in (self.base, self.source))
        return base, source

    def outcome(self, side: str) -> float:
        """Of an ordinary run."""
        return float(self.read(self.decoder.run(getattr(self, side), lambda _, written, biases: _total(written, biases))[1]))

    def scores(self, parts: Collection[float]) -> dict[str, float]:
        """Edge -> its score, with the gradient's mean over points that lie so far from source to base."""
        found = [self._scores(self.source + part * (self.base - self.source)) for part in parts]
        return {edge: sum(one[edge] for one in found) / len(found) for edge in found[0]}

    def _scores(self, embedded: Tensor) -> dict[str, float]:
        base, source = self.ends
        leaves: dict[str, Tensor] = {}
        edges: list[tuple[str, str]] = []

        def read(name: str, written: dict[str, Tensor], biases: Tensor) -> Tensor:
            leaves[name] = torch.zeros_like(embedded, requires_grad=True)
            edges.extend((sender, name) for sender in written)
            return _total(written, biases) + leaves[name]

        every = self.read(self.decoder.run(embedded, read)[1])
        gradient = dict(zip(leaves, torch.autograd.grad(every, list(leaves.values())), strict=True))
        return {f"{sender}->{name}": float(((source[sender] - base[sender]) * gradient[name]).sum()) for sender, name in edges}

    def circuit(self, edges: Collection[str]) -> float:
        """The outcome of base's prompt where all edges but these carry source's values."""

        def read(name: str, written: dict[str, Tensor], biases: Tensor) -> Tensor:
            mixed = {sender: now if f"{sender}->{name}" in edges else self.ends[1][sender] for sender, now in written.items()}
            return _total(mixed, biases)

        return float(self.read(self.decoder.run(self.base, read)[1]))


def names_of(graph: Graph, chosen: np.ndarray) -> set[str]:
    """Names of the edges that are marked."""
    return {name for name, inside in zip(graph.edges, chosen[tuple(graph.places.T)], strict=True) if inside}
