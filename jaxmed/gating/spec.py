"""What decides the numbers of a study of a gate, beside model and pairs; it is the command's flags, too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """The settings of a study of a gate."""

    layer: int = -1
    """Layer whose neurons are ranked and patched together; negative counts from the last."""
    control_layer: int | None = None
    """Layer whose strongest neurons are the control; default: the middle one."""
    upstream: tuple[str, ...] = ()
    """Modules before the layer whose effect may go through its neurons, such as mlp_out:11; default: the strongest attention_out and
    mlp_out, as discovery pairs rank them."""
    windows: tuple[int, ...] = (32,)
    """Widths of windows of adjacent neurons that are compared with windows of random ones; none leaves the test out."""
    draws: int = 5
    """Random groups of neurons, matched in size of change, for every number of neurons."""
    shuffles: int = 19
    """Random orders that windows are compared with; the smallest p is 1 / (1 + shuffles)."""
    sufficient: float = 0.8
    """Part of the effect of the layer's whole MLP that a sufficient group has."""
    tokens: int = 32
    """Tokens of an answer at most, while the group is clamped; 0: nothing is written."""
    text: str = "neutral"
    """Text file, or the bundled neutral, whose perplexity is measured with the group clamped; empty: none."""
    seed: int = 0
    """Seed of the halves, of random groups and orders."""
