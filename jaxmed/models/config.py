"""What a decoder is made of: one frozen record, filled by a family preset from a checkpoint's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        base: the base of the frequencies.
        scaling: "none", "linear" (all frequencies divided by `factor`), or "llama3" (low frequencies divided, high ones kept,
            a linear ramp between; Llama 3.1), or "factors" (each frequency divided by its own factor, as GGUF files store it).
        factor, low_factor, high_factor, original_length, factors: parameters of the scaling.
    """

    base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the arithmetic of a decoder. Letters as in `axes.py`."""

    family: str
    layers: int  # L
    width: int  # D
    heads: int  # N
    kv_heads: int  # K
    head_width: int  # H
    neurons: int  # F
    vocabulary: int  # V
    max_length: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    pre_norm: bool = True
    post_norm: bool = False
    query_key_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    windows: tuple[int, ...] | None = None  # per layer: how many tokens a query sees; None: all
    dtype: str = "float32"

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def compute(self) -> Any:
        return jnp.dtype(self.dtype)

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
        }

    @property
    def layer_weights(self) -> int:
        """Weights in one block's matrices."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.width * self.neurons * (self.sizes["C"] + 1)
