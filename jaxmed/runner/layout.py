"""What a run sees: how tokens of a batch see each other, what earlier tokens left behind, and rows that join late."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.interventions.edits import TokenIndex


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch see each other.

    Attributes:
        position: int [B, T], RoPE position of every token; [1, T] where all rows have the same.
        visible: bool [B or 1, T, S], whether query token t may see key token s (causal and padding masks included).
        index: which real token each column is, for `Where.position`.
        trunk, branch: where `branch` is not 0, a row is `trunk` tokens of ordinary text, and then branches of `branch` tokens each; a
            branch sees the trunk and itself alone, and `visible` is of branches: [B, branches, branch, trunk + branch].
        keys: int [B or 1, S], RoPE position of every key, where the queries are some of the tokens alone; else None.
    """

    position: Any
    visible: Any
    index: TokenIndex
    trunk: int = field(default=0, metadata={"static": True})
    branch: int = field(default=0, metadata={"static": True})
    keys: Any = None

    def asked(self, columns: Any) -> Layout:
        """How the tokens at columns int [R] see all of them."""
        return replace(self, position=self.position[:, columns], visible=self.visible[:, columns], keys=self.position)


def causal_layout(batch: int, length: int, padding: Any = None) -> Layout:
    """The layout of ordinary text. `padding` int [B]: how many tokens at the left of each row are padding."""
    left = jnp.zeros(batch, jnp.int32) if padding is None else jnp.asarray(padding, jnp.int32)
    column = jnp.arange(length)[None]
    counted = column - left[:, None]
    causal = column[0, :, None] >= column
    visible = causal[None] & (counted >= 0)[:, None, :]
    return Layout(jnp.maximum(counted, 0), visible, TokenIndex(counted, length - left))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Keys and values that earlier tokens have left behind, rotated: of a base run, or of prompts that are continued.

    Attributes:
        key, value: [L, b, S, K, H]; each of the b rows serves B / b rows of the run that sees it.
        position: int [b, S], RoPE position of every token.
        seen: bool [b, S], which of them may be seen (not padding, not beyond the first patched token).
    """

    key: Any
    value: Any
    position: Any
    seen: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entry:
    """Rows that join the stream late, each at its own layer.

    Attributes:
        stream: float32 [B, T, D], each row's residual stream where it joins.
        layer: int [B].
        mid: bool [B], whether the row replaces residual_mid (its layer's MLP still runs) or residual_out.
    """

    stream: Any
    layer: Any
    mid: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Restart:
    """What restarted runs keep of the base run, for one window of tokens: the tokens before it, and how its own see each other."""

    prefix: Prefix
    layout: Layout
