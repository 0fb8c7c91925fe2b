"""What a decoder is made of: one frozen record, filled by a family preset from a checkpoint's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 once it is imported)
import numpy as np

from jaxmed.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; `models/rope.py` turns it into frequencies.

    Attributes:
        base: the base of the frequencies.
        scaling: a key of `rope.SCALINGS`.
        rotary_fraction: part of the head width that is rotated, from its start.
        factor, low_factor, high_factor, original_length, factors, short_factors, beta_fast, beta_slow, truncate: parameters of
            the scaling.
        amplitude: factor on cosines and sines.
    """

    base: float = 10000.0
    scaling: str = "none"
    rotary_fraction: float = 1.0
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the arithmetic of a decoder. Letters as in `axes.py`."""

    family: str
    layers: int  # L
    width: int  # D
    heads: int  # N
    kv_heads: int  # K
    head_width: int  # H
    neurons: int  # F, over all experts
    vocabulary: int  # V
    max_length: int
    rope: Rope | None = Rope()  # None: learned positions
    local_rope: Rope | None = None  # of layers with a sliding window, where it differs
    norm: str = "rms"  # or "layer": mean subtracted, and a bias
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to the norms' scales
    pre_norm: bool = True
    post_norm: bool = False
    query_key_norm: str = ""  # "head": over each head; "all": over all heads together
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    windows: tuple[int, ...] | None = None  # per layer: how many tokens a query sees; None: all
    score_scale: float | None = None  # of attention scores; None: 1 / sqrt(H)
    score_cap: float = 0.0  # soft cap of attention scores; 0: none
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    experts: int = 0  # X; 0: no mixture
    experts_used: int = 0  # per token
    experts_normed: bool = False  # whether the weights of the used experts sum to one
    dtype: str = "float32"
    int8: bool = False  # matrices of the blocks kept as int8, with one scale per output channel
    mesh: Any = None  # where its axis "fsdp" splits the weights: programs gather each layer's; else None. A `Model` sets it

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def compute(self) -> Any:
        return np.dtype(self.dtype)

    @property
    def norm_bias(self) -> bool:
        return self.norm == "layer"

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every letter of the legend that the model fixes."""
        return {
            "L": self.layers,
            "D": self.width,
            "N": self.heads,
            "K": self.kv_heads,
            "H": self.head_width,
            "F": self.neurons,
            "V": self.vocabulary,
            "G": self.group,
            "J": self.group + 2,
            "C": 2 if self.gated else 1,
            "X": max(self.experts, 1),
            "M": self.neurons // max(self.experts, 1),
            "Q": self.max_length,
        }

    @property
    def layer_weights(self) -> int:
        """Weights in one block's matrices."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.width * self.neurons * (self.sizes["C"] + 1) + self.width * self.experts


MOST_LAYERS = 2**14
"""Layers that a range names at most; no model has as many."""


def parse_layers(text: str) -> tuple[int, ...] | None:
    """ "9,19,20-29" as layer numbers; an empty text is all layers (None)."""
    if not text:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--layers {text!r}: {part!r} is no layer. Give numbers and ranges, such as 9,19,20-29.")
        if int(last or first) < int(first):
            raise UserError(f"--layers {text!r}: the range {part!r} ends before it begins. Write {last}-{first}.")
        layers += range(int(first), min(int(last or first), int(first) + MOST_LAYERS) + 1)
    return tuple(layers)
