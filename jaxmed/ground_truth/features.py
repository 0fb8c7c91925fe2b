"""Weights from what they shall do: the first dimensions of the residual stream are named features.

A part is a row that says which features it reads and which it writes. Why the weights do exactly that:

- Norms divide by a constant. The feature "one" is `ANCHOR` at every token and outweighs all else, so that the root mean square changes by
  less than 1e-4 of itself, whatever is patched; the norms' scales undo it. Real models have such massive activations, too.
- A neuron's gate is far from zero on both sides, where SiLU is the identity or zero up to 1e-7.
- A head's scores differ by `SHARP`, so that its softmax has one token; they use the slowest rotary frequency, which turns by less than
  1e-3 radians over a prompt.

All other weights, and the parts of the stream without a name, are random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxmed.distributed import make_mesh
from jaxmed.ground_truth.words import CARRIED, CLASSES, COLOURS, VOCABULARY, Mix, make_tokenizer
from jaxmed.models.config import ModelConfig, Rope
from jaxmed.models.families.llama import llama_json
from jaxmed.models.load import from_params
from jaxmed.models.model import Model
from jaxmed.models.params import param_letters, param_shapes, param_shardings

CONFIG = ModelConfig("llama", 4, 64, 4, 2, 8, 32, len(VOCABULARY), 64, Rope(1e6), tied=False)
"""Shape of the planted models; heads share keys and values in twos."""
HEARD = ("heard", "heard too", "danger", "first", "second", "relayed", "answer", *(f"said {colour}" for colour in COLOURS))
FEATURES = ("one", *dict.fromkeys(name for carried in CARRIED.values() for name in carried), *HEARD)
"""Feature -> dimension of the residual stream, by place; words carry the first ones, parts write the others."""
ANCHOR = 1000.0
SHARP = 40.0


@dataclass(frozen=True)
class Part:
    """What is planted in one unit, and what patching that unit alone does.

    Attributes:
        layer: where it is.
        kind: "reads", "signals", "gate", "adder", "cooperates", "joins", "cancels", "copies" or "path".
        effect: the expected indirect effect of this unit alone on logit-diff, mean over the pairs, without noise.
        position: of the token at which it acts, from the right.
    """

    layer: int
    kind: str
    effect: float
    position: int = field(default=-1, kw_only=True)


@dataclass(frozen=True)
class Neuron(Part):
    """Where all features of `when` are there, adds `writes`, times the sum of `times`.

    Attributes:
        above: the sum of `when` at which it begins.
    """

    when: Mix = field(kw_only=True)
    writes: Mix = field(kw_only=True)
    above: float = field(default=0.3, kw_only=True)
    times: Mix = field(default_factory=lambda: {"one": 1.0}, kw_only=True)


@dataclass(frozen=True)
class Head(Part):
    """At tokens with `query`, adds what the token with `key` has of the features in `moves`: feature -> (feature written, coefficient).

    Where no token has `key`, all tokens are attended to equally.
    """

    query: str = field(kw_only=True)
    key: str = field(kw_only=True)
    moves: Mapping[str, tuple[str, float]] = field(kw_only=True)


def place(parts: Sequence[Part], seed: int) -> list[int]:
    """The index of every part within its layer: neurons anywhere, heads of one layer with keys of their own."""
    rng = np.random.default_rng([seed, 1])
    neurons = {layer: rng.permutation(CONFIG.neurons).tolist() for layer in range(CONFIG.layers)}
    groups = {layer: rng.permutation(CONFIG.kv_heads).tolist() for layer in range(CONFIG.layers)}
    found = []
    for part in parts:
        head = isinstance(part, Head)
        found.append(groups[part.layer].pop() * CONFIG.group + int(rng.integers(CONFIG.group)) if head else neurons[part.layer].pop())
    return found


def vector(mix: Mix) -> np.ndarray:
    """Features as a vector [D], as norms give them: "one" is 1."""
    found = np.zeros(CONFIG.width)
    for name, coefficient in mix.items():
        found[FEATURES.index(name)] = coefficient
    return found


def write_model(name: str, parts: Sequence[Part], answers: Mapping[str, Mix], noise: float, seed: int) -> tuple[Model, list[int]]:
    """The model with these parts, and the parts' indices.

    Args:
        answers: word -> the features that its logit reads.
        noise: standard deviation of all weights without a meaning.
    """
    rng, places = np.random.default_rng([seed, 0]), place(parts, seed)
    params = jax.tree.map(lambda letters: noise * rng.normal(size=[CONFIG.sizes[letter] for letter in letters]), param_letters(CONFIG))
    _write_norms(params)
    params["embedding"] = _embedding(rng)
    for word, mix in answers.items():
        params["head"][VOCABULARY.index(word)] = vector(mix)
    for part, index in zip(parts, places, strict=True):
        WRITERS[type(part)](params["blocks"], part, index)
    return make_model(name, CONFIG, params), places


def _write_norms(params: dict[str, Any]) -> None:
    """Scales by which a stream with "one" at `ANCHOR` comes out as it is, with "one" at 1."""
    scale = np.full(CONFIG.width, ANCHOR / CONFIG.width**0.5)
    scale[FEATURES.index("one")] /= ANCHOR
    params["final_norm"] = scale
    for norm in ("attention_norm", "mlp_norm"):
        params["blocks"][norm] = np.tile(scale, (CONFIG.layers, 1))


def _embedding(rng: np.random.Generator) -> np.ndarray:
    """Every word has "one", the features of its class, and a random direction among the dimensions without a name."""
    table = np.zeros((CONFIG.vocabulary, CONFIG.width))
    nameless = CONFIG.width - len(FEATURES)
    table[:, len(FEATURES) :] = rng.normal(size=(CONFIG.vocabulary, nameless)) / nameless**0.5
    for kind, mix in CARRIED.items():
        table[[VOCABULARY.index(word) for word in CLASSES[kind]], : len(FEATURES)] = vector(mix)[: len(FEATURES)]
    table[:, FEATURES.index("one")] = ANCHOR
    return table


def _write_neuron(blocks: dict[str, np.ndarray], part: Neuron, index: int) -> None:
    gain = SHARP / (sum(part.when.values()) - part.above)  # the gate's input is SHARP where all features are there
    blocks["gate_up"][part.layer, :, 0, index] = gain * vector({**part.when, "one": -part.above})
    blocks["gate_up"][part.layer, :, 1, index] = vector(part.times)
    blocks["down"][part.layer, index] = vector(part.writes) / SHARP


def _write_head(blocks: dict[str, np.ndarray], part: Head, index: int) -> None:
    group, member = divmod(index, CONFIG.group)
    slowest = CONFIG.head_width // 2 - 1
    strength = (SHARP * CONFIG.head_width**0.5) ** 0.5
    own = blocks["qkv"][part.layer, :, group]  # [D, J, H]
    own[:, [member, CONFIG.group, CONFIG.group + 1]] = 0
    own[:, member, slowest] = vector({part.query: strength})
    own[:, CONFIG.group, slowest] = vector({part.key: strength})
    blocks["out"][part.layer, index] = 0
    for width, (read, (written, coefficient)) in enumerate(part.moves.items()):
        own[:, CONFIG.group + 1, width] = vector({read: 1.0})
        blocks["out"][part.layer, index, width] = vector({written: coefficient})


WRITERS: dict[type, Any] = {Neuron: _write_neuron, Head: _write_head}


def make_model(name: str, config: ModelConfig, params: Any, vocabulary: tuple[str, ...] = VOCABULARY) -> Model:
    """A model in memory with a tokenizer of words; `export_folder` can write it as an ordinary Llama."""
    devices = make_mesh()
    placed = jax.tree.map(
        lambda values, like, where: jax.device_put(np.asarray(values, like.dtype), where),
        params,
        param_shapes(config),
        param_shardings(config, devices),
    )
    return replace(from_params(config, placed, devices, name, make_tokenizer(vocabulary)), source_config=llama_json(config))
