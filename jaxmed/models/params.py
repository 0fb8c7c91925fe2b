"""What a model's parameters are: letters, shapes, dtypes and shardings of every array, and random ones for tests and benchmarks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.axes import MESH_AXES, partition
from jaxmed.errors import UserError
from jaxmed.models.config import ModelConfig

Params = dict[str, Any]
MATRICES = {"qkv": 1, "out": 2, "gate_up": 1, "down": 1}
"""The matrices of a block, and how many of their axes are inputs."""


def block_letters(config: ModelConfig) -> dict[str, str]:
    """Letters of every parameter of a block, without the leading `L`.

    Matrices are stored input by output: Eigen, which XLA uses on the CPU, multiplies faster so, and the rows of `down` are the
    output vectors of neurons, which the engine gathers.
    """
    norms = [*(("attention_norm", "mlp_norm") if config.pre_norm else ())]
    norms += ("attention_post_norm", "mlp_post_norm") if config.post_norm else ()
    letters = {"qkv": "DKJH", "out": "NHD", "gate_up": "DXCM" if config.experts else "DCF", "down": "FD"}
    letters |= dict.fromkeys(norms, "D")
    if config.norm_bias:
        letters |= {name + "_bias": "D" for name in norms}
    if config.query_key_norm:
        letters |= {"query_norm": "H", "key_norm": "H"} if config.query_key_norm == "head" else {"query_norm": "NH", "key_norm": "KH"}
    if config.qkv_bias:
        letters["qkv_bias"] = "KJH"
    if config.out_bias:
        letters["out_bias"] = "D"
    if config.mlp_bias:
        letters |= {"gate_up_bias": "CF", "down_bias": "D"}
    if config.experts:
        letters["router"] = "DX"
    return letters | {name + "_scale": letters[name][inputs:] for name, inputs in MATRICES.items() if config.int8}


def param_dtype(config: ModelConfig, name: str) -> Any:
    """The dtype a parameter is kept in: norms and scales always float32."""
    if config.int8 and name in MATRICES:
        return jnp.dtype(jnp.int8)
    return jnp.dtype(jnp.float32) if "norm" in name or name.endswith("_scale") else config.compute


def param_letters(config: ModelConfig) -> Params:
    """Letters of every parameter of the model, in the nested dict that holds the parameters."""
    top: Params = {"embedding": "VD", "final_norm": "D", "blocks": {k: "L" + v for k, v in block_letters(config).items()}}
    if config.norm_bias:
        top["final_norm_bias"] = "D"
    if config.rope is None:
        top["positions"] = "QD"
    return top if config.tied else {**top, "head": "VD"}


def param_shapes(config: ModelConfig) -> Params:
    """`jax.ShapeDtypeStruct` of every parameter."""
    sizes = config.sizes

    def shape(path: Any, letters: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in letters), param_dtype(config, path[-1].key))

    return jax.tree.map_with_path(shape, param_letters(config))


def param_shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """Sharding of every parameter on `mesh`, from `axes.py`."""
    return jax.tree.map(lambda x, s: partition(x, s.shape, mesh), param_letters(config), param_shapes(config))


def check_split(config: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises a UserError where weights do not divide over a mesh; it says what of them, and which sizes of the axis would divide."""
    letters = {letter for held in jax.tree.leaves(param_letters(config)) for letter in held}
    for axis in ("tensor", "fsdp"):
        sizes = {letter: config.sizes[letter] for letter in sorted(letters) if axis in MESH_AXES.get(letter, ())}
        if axis == "fsdp":
            sizes["V"] //= mesh.shape["tensor"]  # which splits it first
        if undivided := [letter for letter, size in sizes.items() if size % mesh.shape[axis]]:
            what = ", ".join(f"{NAMES[letter]} ({config.sizes[letter]:,})" for letter in undivided)
            legal = math.gcd(*sizes.values())
            shown = ", ".join(str(size) for size in range(1, min(legal, MOST_NAMED) + 1) if legal % size == 0)
            raise UserError(
                f"--mesh {axis}={mesh.shape[axis]} does not divide this model's {what}. Sizes of {axis!r} that divide it: {shown}."
            )


MOST_NAMED = 256
NAMES = {"N": "query heads", "K": "key/value heads", "F": "MLP neurons", "X": "experts", "V": "vocabulary", "D": "residual width"}


def random_params(config: ModelConfig, seed: int, mesh: jax.sharding.Mesh | None = None, spread: float = 1.0) -> Params:
    """Random parameters: matrices with standard deviation `spread / sqrt(fan in)`, norms near one. For tests and benchmarks."""
    letters, shapes = param_letters(config), param_shapes(config)

    def draw(key: jax.Array, name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        noise = jax.random.normal(key, shape.shape, jnp.float32)
        if "norm" in name:
            return (1 - config.norm_offset + 0.1 * noise).astype(shape.dtype)
        if name.endswith("_scale"):
            return jnp.full(shape.shape, spread / 32 / config.width**0.5, shape.dtype)
        if shape.dtype == jnp.int8:
            return jnp.clip(32 * noise, -127, 127).astype(shape.dtype)
        fan_in = {"qkv": config.width, "gate_up": config.width, "down": config.neurons}.get(name, config.width)
        return (spread * noise / fan_in**0.5).astype(shape.dtype)

    leaves, tree = jax.tree.flatten_with_path(letters)
    names = [path[-1].key for path, _ in leaves]

    def draw_all(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(names))
        return jax.tree.unflatten(tree, [draw(*each) for each in zip(keys, names, jax.tree.leaves(shapes), strict=True)])

    shardings = param_shardings(config, mesh) if mesh is not None else None
    return jax.jit(draw_all, out_shardings=shardings)(jax.random.key(seed))
