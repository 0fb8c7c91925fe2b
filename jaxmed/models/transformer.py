"""The decoder block, declared in Flax. Both the full forward and the exact engine run this one `Block`.

Parameters live outside as a nested dict of arrays; the blocks' arrays carry a leading layer axis `L`. `open_block` puts one
layer's slice back into the module inside the traced function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.axes import Placement, from_columns, hold_rows, lead, whole_rows
from jaxmed.interventions.sites import BRANCHES
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import activate, cap, normalise, project, route, scored_project
from jaxmed.models.params import MATRICES, Params, block_letters, param_dtype
from jaxmed.models.rope import Angles, rotate
from jaxmed.models.rules import EXACT, Rules

Touch = Callable[[str, jax.Array], jax.Array]
"""Called at every site with its name and activation; returns the activation to go on with."""
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(query [B,T,K,G,H], key [B,T,K,H], value [B,T,K,H]), rotated -> head outputs [B,T,K,G,H]."""


def untouched(name: str, activation: jax.Array) -> jax.Array:
    """The `Touch` that changes and records nothing."""
    del name
    return activation


class Block(nnx.Module):
    """One decoder layer. Letters as in `axes.py`; every parameter's letters are in `block_letters`."""

    qkv: nnx.Param  # queries, key and value of each group side by side: one matmul, and it still shards over K
    out: nnx.Param
    gate_up: nnx.Param  # gate and up side by side: one matmul, and it still shards over F
    down: nnx.Param
    router: nnx.Param
    query_norm: nnx.Param
    key_norm: nnx.Param
    qkv_bias: nnx.Param
    out_bias: nnx.Param
    gate_up_bias: nnx.Param
    down_bias: nnx.Param
    qkv_scale: nnx.Param  # of int8
    out_scale: nnx.Param

    added: Params  # matrix -> (in [...in, R], out [R, ...out]), whose product is added to it
    transposed: Params  # matrix -> its transpose, flat, for gradients
    scored: Params  # matrix -> totals over examples, as `layers.scored_project` takes them; "counted" -> tokens [B,T]

    def __init__(self, config: ModelConfig):
        self.config, self.rules = config, EXACT
        self.added, self.transposed, self.scored = nnx.data({}), nnx.data({}), nnx.data({})
        for name, letters in block_letters(config).items():
            shape = tuple(config.sizes[letter] for letter in letters)
            setattr(self, name, nnx.Param(jnp.zeros(shape, param_dtype(config, name))))

    def norm(self, x: jax.Array, name: str, dtype: Any) -> jax.Array:
        """x [B,T,D] through one of the block's norms over D, in `dtype`."""
        bias = getattr(self, name + "_bias")[...] if self.config.norm_bias else None
        return normalise(self.config, x, getattr(self, name)[...], bias, dtype, rules=self.rules)

    def placed(self, name: str) -> Placement:
        """How a matrix of the block is split over devices."""
        return Placement(self.config.mesh, block_letters(self.config)[name])

    def times(self, x: jax.Array, name: str, inputs: int = 1, dtype: Any = None) -> jax.Array:
        """x [B,T,...in] times one of the block's matrices, and what is added to it -> [B,T,...out]."""
        matrix, placed = getattr(self, name)[...], self.placed(name)
        if name in self.scored:
            out = scored_project(x, matrix, self.scored[name], self.scored.get("counted"), inputs, placed)
        else:
            out = project(x, matrix, inputs, transposed=self.transposed.get(name), placed=placed)
        if self.config.int8:
            out = out * lead(getattr(self, name + "_scale")[...], out.ndim)
        if name in self.added:
            down, up = self.added[name]
            out = out + project(project(x, down.astype(x.dtype), inputs, x.dtype), up.astype(x.dtype))
        return out if dtype is None else out.astype(dtype)

    def attention(
        self, h: jax.Array, angles: Angles | None, attend: Attend, touch: Touch = untouched, asked: jax.Array | None = None
    ) -> jax.Array:
        """h [B,T,D] -> residual_mid [B,T,D]; with `asked` int [R], of these columns alone: [B,R,D], and `attend` is asked so."""
        config, dtype = self.config, self.config.compute
        h = touch("residual_in", h)
        x = self.norm(h, "attention_norm", dtype) if config.pre_norm else h.astype(dtype)
        qkv = self.times(x, "qkv", dtype=dtype)
        if config.qkv_bias:
            qkv = qkv + lead(self.qkv_bias[...], qkv.ndim)
        query, key, value = qkv[..., : config.group, :], qkv[..., config.group, :], qkv[..., config.group + 1, :]
        heads = (*h.shape[:2], config.heads, config.head_width)
        query = query.reshape(heads)
        if config.query_key_norm:
            axes = {"head": 1, "all": 2}[config.query_key_norm]
            query = normalise(config, query, self.query_norm[...], None, dtype, axes, self.rules)
            key = normalise(config, key, self.key_norm[...], None, dtype, axes, self.rules)
        query, key, value = touch("query", query), touch("key", key), touch("value", value)
        query, key = rotate(query, angles), touch("cached_key", rotate(key, angles))
        value = touch("cached_value", value)
        if asked is not None:
            query, h = query[:, asked], h[:, asked]
        mixed = attend(query.reshape(*h.shape[:2], config.kv_heads, config.group, config.head_width), key, value)
        mixed = touch("head_out", mixed.reshape(query.shape))
        return self.add_attention(h, self.times(mixed, "out", inputs=2), touch)

    def add_attention(self, h: jax.Array, raw: jax.Array, touch: Touch = untouched) -> jax.Array:
        """residual_in [B,T,D] and the output projection, bias not yet added [B,T,D] -> residual_mid."""
        raw = touch("attention_raw", raw + lead(self.out_bias[...], raw.ndim).astype(raw.dtype) if self.config.out_bias else raw)
        return touch("residual_mid", h + touch("attention_out", self.post(raw, "attention_post_norm")))

    def mlp(self, h: jax.Array, touch: Touch = untouched, touch_branch: Touch | None = None) -> jax.Array:
        """residual_mid [B,T,D] -> residual_out [B,T,D]; `touch_branch` is called at its branches, which are not taken apart without it."""
        config, dtype = self.config, self.config.compute
        x = self.norm(h, "mlp_norm", dtype) if config.pre_norm else h.astype(dtype)
        branches = self.times(x, "gate_up", dtype=dtype)
        if config.mlp_bias:
            branches = branches + lead(self.gate_up_bias[...], branches.ndim)
        if touch_branch is not None:
            branches = self.touched(branches, touch_branch)
        active: Any = activate(config, branches, self.rules)
        neuron = touch("neuron", active.reshape(*h.shape[:2], config.neurons))
        if config.experts:
            exact = self.norm(h, "mlp_norm", jnp.float32)  # in bfloat16 near ties would be routed by rounding
            scores = touch("router_logits", project(exact, self.router[...], placed=self.placed("router")))
            weight = touch("routing", route(config, scores))
            neuron = neuron * jnp.repeat(weight, config.sizes["M"], axis=-1).astype(dtype)
        raw = self.times(neuron, "down")
        raw = touch("mlp_raw", raw + lead(self.down_bias[...], raw.ndim).astype(raw.dtype) if config.mlp_bias else raw)
        return touch("residual_out", h + touch("mlp_out", self.post(raw, "mlp_post_norm")))

    def touched(self, branches: jax.Array, touch: Touch) -> jax.Array:
        """The MLP's branches [B,T,...,C,M], put together anew where `touch` changes one of them [B,T,F]."""
        parts = [branches[..., number, :] for number in range(branches.shape[-2])]
        flat = [part.reshape(*branches.shape[:2], self.config.neurons) for part in parts]
        after = [touch(site, part) for site, part in zip(BRANCHES, flat, strict=False)]
        if all(new is old for new, old in zip(after, flat, strict=True)):
            return branches
        return jnp.stack([new.reshape(part.shape) for new, part in zip(after, parts, strict=True)], axis=-2)

    def post(self, raw: jax.Array, norm: str) -> jax.Array:
        """What is added to the residual stream for the raw output of a module: its post-norm and scale where the family has them."""
        added = self.norm(raw, norm, jnp.float32) if self.config.post_norm else raw
        return added * self.config.residual_scale if self.config.residual_scale != 1 else added


def matrix_rows(config: ModelConfig, params: Params, name: str, *index: Any) -> jax.Array:
    """Rows [..., D] of the blocks' `out` or `down` at (layer, row...) indices, float32: what one head dimension or neuron writes."""
    rows = params["blocks"][name][jax.tree.map(partial(whole_rows, config.mesh), index)]
    rows = from_columns(config.mesh, rows).astype(jnp.float32)
    if not config.int8:
        return rows
    scale = params["blocks"][name + "_scale"][index[0]]
    return rows * scale.reshape(*scale.shape[:-1], *(1,) * (rows.ndim - scale.ndim), scale.shape[-1])


@cache
def _declaration(config: ModelConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Block(config)))[0]


def blocks_from(blocks: Params, first: int) -> Params:
    """The stacked arrays of the blocks from number `first` on."""
    return jax.tree.map(lambda stack: stack[first:], blocks)


def with_transposes(params: Params) -> Params:
    """Parameters with transposed copies of the blocks' matrices, [L,V,D], which make gradients of activations faster on the CPU."""

    def transpose(name: str, matrix: jax.Array) -> jax.Array:
        fan_in = math.prod(matrix.shape[1 : 1 + MATRICES[name]])
        return jnp.swapaxes(matrix.reshape(len(matrix), fan_in, -1), 1, 2)

    matrices = {name: params["blocks"][name] for name in MATRICES}
    transposed = jax.jit(lambda matrices: {name: transpose(name, matrix) for name, matrix in matrices.items()})(matrices)
    return {**params, "blocks": {**params["blocks"], TRANSPOSED: transposed}}


ADDED, TRANSPOSED, SCORED = _BESIDE = "added", "transposed", "scored"
"""Entries of the blocks' parameters beside those that are declared, or absent: see `Block`."""


def open_block(config: ModelConfig, arrays: Params, rules: Rules = EXACT) -> Block:
    """The block whose parameters are `arrays` (one layer's slice), linearised by `rules`."""
    block = nnx.merge(_declaration(config), {name: array for name, array in arrays.items() if name not in _BESIDE})
    block.added, block.transposed, block.scored = (nnx.data(arrays.get(name, {})) for name in _BESIDE)
    block.rules = rules
    return block


def embed(config: ModelConfig, params: Params, tokens: jax.Array, position: jax.Array) -> jax.Array:
    """tokens and their positions int [B,T] -> residual stream float32 [B,T,D]."""
    h = embedded(config, params["embedding"], tokens).astype(jnp.float32) * jnp.asarray(config.embedding_scale, config.compute).astype(
        jnp.float32
    )
    if config.rope is not None:
        return h
    return h + from_columns(config.mesh, params["positions"][whole_rows(config.mesh, position)]).astype(jnp.float32)


def embedded(config: ModelConfig, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows [B,...,D] of the embedding or the unembedding at tokens int [B,...]."""
    return hold_rows(config.mesh, whole_rows(config.mesh, table[whole_rows(config.mesh, tokens)]))


def head(params: Params) -> jax.Array:
    """The unembedding [V,D]; the embedding itself where the two are tied."""
    return params.get("head", params["embedding"])


def final_norm(config: ModelConfig, params: Params, h: jax.Array, rules: Rules = EXACT) -> jax.Array:
    """Residual stream [...,D] -> what the unembedding reads [...,D]: rows go to the devices that hold the unembedding, which stays."""
    x = normalise(config, hold_rows(config.mesh, h), params["final_norm"], params.get("final_norm_bias"), config.compute, rules=rules)
    return whole_rows(config.mesh, x)


def as_logits(config: ModelConfig, products: jax.Array) -> jax.Array:
    """Logits from the products of `final_norm` and rows of the unembedding: the family's scale and soft cap."""
    return cap(products * config.logit_scale if config.logit_scale != 1 else products, config.logit_cap)
