"""What a family preset is made of: a config reader and a name table, both data.

A name table says which checkpoint tensors make up each parameter, and how to take the parameter apart again, so that one table
serves loading, loading of one device's slice, and export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxmed.models.config import ModelConfig

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor.

    Attributes:
        name: its name; `{l}` stands for the layer, `{e}` for the expert (all experts are stacked on a new first axis).
        shape: its shape in letters, without the experts: "NH" is N * H, "F+F" is twice F.
    """

    name: str
    shape: tuple[str, ...]


class Layout(NamedTuple):
    """How tensors lie in a parameter.

    Attributes:
        join: (sizes, *tensors) -> the parameter (for block parameters: one layer of it). Of matrices it takes JAX arrays too, inside
            traced functions: low-rank changes of the tensors are laid out by the same rule.
        split: (sizes, parameter) -> the tensors.
    """

    join: Callable[..., np.ndarray]
    split: Callable[[Sizes, np.ndarray], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Rule:
    """One parameter of the model: where it sits in the nested dict, its checkpoint tensors, and how they lie in it."""

    path: tuple[str, ...]
    sources: tuple[Source, ...]
    layout: Layout


@dataclass(frozen=True)
class Family:
    """A preset.

    Attributes:
        read: config.json, with `defaults` filled in -> ModelConfig.
        rules: the name table; rules of parameters that a config does not have are left out.
        known: config keys that `read` uses.
        defaults: values of keys that a config may leave out.
        needed: keys that must hold one of these values, because nothing else is implemented.
        ignored: checkpoint tensors that carry nothing.
        begins: prefix that some checkpoints leave out of every name.
        inputs_first: whether the blocks' matrices are stored input by output.
    """

    read: Callable[[Mapping[str, Any]], ModelConfig]
    rules: tuple[Rule, ...]
    known: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    needed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    begins: str = "model."
    inputs_first: bool = False


def _fuse_qkv(sizes: Sizes, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[NH, ...] and two [KH, ...] -> [K, J, H, ...]."""
    kv, group, width, rest = sizes["K"], sizes["G"], sizes["H"], query.shape[1:]
    parts = [query.reshape(kv, group, width, *rest), key.reshape(kv, 1, width, *rest), value.reshape(kv, 1, width, *rest)]
    return query.__array_namespace__().concat(parts, axis=1)


def _split_qkv(sizes: Sizes, fused: np.ndarray) -> tuple[np.ndarray, ...]:
    group, rest = sizes["G"], fused.shape[3:]
    return tuple(part.reshape(-1, *rest) for part in (fused[:, :group], fused[:, group], fused[:, group + 1]))


def _cut_qkv(sizes: Sizes, joined: np.ndarray) -> np.ndarray:
    """[NH + KH + KH, ...] -> [K, J, H, ...]."""
    queries, keys = sizes["N"] * sizes["H"], sizes["K"] * sizes["H"]
    return _fuse_qkv(sizes, joined[:queries], joined[queries : queries + keys], joined[queries + keys :])


def _headed(letter: str) -> Layout:
    """[letter * H, ...] <-> [letter, H, ...]."""
    return Layout(lambda s, w: w.reshape(s[letter], s["H"], *w.shape[1:]), lambda s, p: (p.reshape(-1, *p.shape[2:]),))


def transposed(layout: Layout) -> Layout:
    """The same layout for tensors stored input by output, as GPT-2's are."""
    return Layout(lambda s, *w: layout.join(s, *(x.T for x in w)), lambda s, p: tuple(x.T for x in layout.split(s, p)))


def _last_first(x: np.ndarray) -> np.ndarray:
    return x.__array_namespace__().moveaxis(x, -1, 0)


def inputs_first(layout: Layout) -> Layout:
    """The same layout with the last axis of the parameter, the matrix's inputs, moved to the front."""
    return Layout(lambda s, *w: _last_first(layout.join(s, *w)), lambda s, p: layout.split(s, np.moveaxis(p, 0, -1)))


AS_IS = Layout(lambda s, w: w, lambda s, p: (p,))
TRANSPOSED = transposed(AS_IS)
PER_HEAD = {letter: _headed(letter) for letter in "NK"}
OUT = transposed(PER_HEAD["N"])
QKV_BIAS = Layout(_fuse_qkv, _split_qkv)
QKV_BIAS_IN_ONE = Layout(_cut_qkv, lambda s, p: (np.concatenate(_split_qkv(s, p)),))
QKV, QKV_IN_ONE = inputs_first(QKV_BIAS), inputs_first(QKV_BIAS_IN_ONE)
BRANCHES_BIAS = Layout(lambda s, *w: w[0].__array_namespace__().stack(w), lambda s, p: tuple(p))
BRANCHES = inputs_first(BRANCHES_BIAS)
BRANCHES_IN_ONE = inputs_first(
    Layout(lambda s, w: w.reshape(2, -1, *w.shape[1:]), lambda s, p: (p.reshape(-1, *p.shape[2:]),)),
)
EXPERT_BRANCHES = inputs_first(Layout(lambda s, *w: np.stack(w, axis=1), lambda s, p: tuple(np.moveaxis(p, 1, 0))))
EXPERT_DOWN = Layout(
    lambda s, w: np.swapaxes(w, 1, 2).reshape(-1, w.shape[1]),
    lambda s, p: (np.swapaxes(p.reshape(s["X"], -1, p.shape[-1]), 1, 2),),
)


def layer(path: str, layout: Layout, *sources: tuple[str, tuple[str, ...]], prefix: str = "model.layers.{l}.") -> Rule:
    """A rule for a parameter of every block, from (name within the layer, shape) pairs."""
    return Rule(("blocks", path), tuple(Source(prefix + name, shape) for name, shape in sources), layout)


def norm(path: str, name: str, shape: str = "D", layout: Layout = AS_IS) -> Rule:
    """A rule for a block's norm."""
    return layer(path, layout, (name + ".weight", (shape,)))


EMBEDDING = Rule(("embedding",), (Source("model.embed_tokens.weight", ("V", "D")),), AS_IS)
HEAD = Rule(("head",), (Source("lm_head.weight", ("V", "D")),), AS_IS)
FINAL_NORM = Rule(("final_norm",), (Source("model.norm.weight", ("D",)),), AS_IS)
ATTENTION = (
    layer(
        "qkv",
        QKV,
        ("self_attn.q_proj.weight", ("NH", "D")),
        ("self_attn.k_proj.weight", ("KH", "D")),
        ("self_attn.v_proj.weight", ("KH", "D")),
    ),
    layer("qkv_bias", QKV_BIAS, ("self_attn.q_proj.bias", ("NH",)), ("self_attn.k_proj.bias", ("KH",)), ("self_attn.v_proj.bias", ("KH",))),
    layer("out", OUT, ("self_attn.o_proj.weight", ("D", "NH"))),
    layer("out_bias", AS_IS, ("self_attn.o_proj.bias", ("D",))),
)
MLP = (
    layer("gate_up", BRANCHES, ("mlp.gate_proj.weight", ("F", "D")), ("mlp.up_proj.weight", ("F", "D"))),
    layer("gate_up_bias", BRANCHES_BIAS, ("mlp.gate_proj.bias", ("F",)), ("mlp.up_proj.bias", ("F",))),
    layer("down", TRANSPOSED, ("mlp.down_proj.weight", ("D", "F"))),
    layer("down_bias", AS_IS, ("mlp.down_proj.bias", ("D",))),
)
TOP = (EMBEDDING, HEAD, FINAL_NORM)
PRE_NORMS = (norm("attention_norm", "input_layernorm"), norm("mlp_norm", "post_attention_layernorm"))
HEAD_NORMS = (norm("query_norm", "self_attn.q_norm", "H"), norm("key_norm", "self_attn.k_norm", "H"))
FREQUENCIES = ("model.layers.{l}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
"""Buffers that old checkpoints carry."""
