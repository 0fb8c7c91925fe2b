"""One optimiser step: response-only cross-entropy through the decoder, gradients of what is trained alone, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmed.axes import replicated, weight_parts
from jaxmed.batching.batches import Batch
from jaxmed.batching.losses import response_loss
from jaxmed.finetuning.lora import lay_out, new_factors, with_factors
from jaxmed.finetuning.settings import Settings
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import MATRICES, Params, param_dtype
from jaxmed.models.transformer import blocks_from, with_transposes


def learning_rates(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate of every step, by optax."""
    peak, after = settings.learning_rate, max(1, steps - settings.warmup)
    falls = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, after),
        "cosine": optax.cosine_decay_schedule(peak, after),
    }[settings.schedule]
    if not settings.warmup:
        return falls
    return optax.join_schedules([optax.linear_schedule(0.0, peak, settings.warmup), falls], [settings.warmup])


def make_optimiser(settings: Settings, steps: int) -> optax.GradientTransformation:
    """Clipping and AdamW, decay on matrices alone."""
    decays = partial(jax.tree.map_with_path, lambda path, _: "norm" not in path[-1].key and "bias" not in path[-1].key)
    adam = optax.adamw(
        learning_rates(settings, steps), settings.beta1, settings.beta2, settings.epsilon, weight_decay=settings.weight_decay, mask=decays
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), adam) if settings.clip else adam


def trained_params(config: ModelConfig, settings: Settings, trained: Any, frozen: Params) -> Params:
    """The parameters that the decoder runs on, from what is trained (float32) and what is not."""
    if settings.method == "lora":
        return with_factors(frozen, lay_out(config, settings.lora, trained))
    return jax.tree.map_with_path(lambda path, leaf: leaf.astype(param_dtype(config, path[-1].key)), trained)


def split_params(settings: Settings, params: Params, factors: Any) -> tuple[Any, Params]:
    """(trained, frozen): adapters and the model from the first adapted block on, or float32 copies of all parameters and nothing."""
    if settings.method == "lora":
        first = settings.first_layer
        return factors, {**params, "blocks": jax.jit(partial(blocks_from, first=first))(params["blocks"])} if first else params
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params), {}


MOST_TRANSPOSED = 4e9
"""Bytes of frozen matrices of which a transposed copy is kept on the CPU, for faster gradients."""


def _worth_transposing(model: Model) -> bool:
    held = sum(model.params["blocks"][name].nbytes for name in MATRICES)
    return jax.default_backend() == "cpu" and not model.config.int8 and weight_parts(model.mesh) == 1 and held < MOST_TRANSPOSED


def start(model: Model, settings: Settings, optimiser: optax.GradientTransformation) -> tuple[Any, Any, Params, Any]:
    """(trained, optimiser state, frozen, moved) before the first step, on their devices.

    `moved`: in full fine-tuning on several devices, shardings of the optimiser's moments, of which every device on "data" keeps its own
    part, and of what is trained; else None.
    """
    whole = replicated(model.mesh)
    factors = jax.device_put(new_factors(model.config, settings.lora, settings.seed), whole) if settings.method == "lora" else {}
    trained, frozen = split_params(settings, model.params, factors)
    if settings.method == "lora" and _worth_transposing(model):
        frozen = with_transposes(frozen)
    home = jax.tree.map(lambda leaf: leaf.sharding, trained)
    spread = _spread(trained, model.mesh) if settings.method == "full" and model.mesh.size > 1 else None
    state = jax.jit(optimiser.init, out_shardings=_state_shardings(optimiser, trained, spread or home, whole))(trained)
    return trained, state, frozen, (spread, home) if spread else None


def _spread(trained: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings in which every device on "data" holds its own part: the first axis that is not sharded yet and divides, so that the part
    is as few pieces of memory as can be."""

    def one(leaf: jax.Array) -> jax.sharding.NamedSharding:
        spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]  # type: ignore[attr-defined]
        axes = [i for i in range(leaf.ndim) if spec[i] is None and leaf.shape[i] % mesh.shape["data"] == 0]
        if axes and mesh.shape["data"] > 1:
            spec[axes[0]] = "data"
        return jax.NamedSharding(mesh, jax.P(*spec))

    return jax.tree.map(one, trained)


def _state_shardings(optimiser: Any, trained: Any, shardings: Any, whole: Any) -> Any:
    """Shardings of the optimiser's state: moments as the parameter that they belong to, whatever its shape; counters on every device."""
    state = jax.eval_shape(optimiser.init, trained)
    return optax.tree.map_params(optimiser, lambda _, own: own, state, shardings, transform_non_params=lambda _: whole)


Step = Callable[[Any, Any, Params, Batch], tuple[Any, Any, dict[str, jax.Array]]]
"""(trained, optimiser state, frozen, batches [A, ...]) -> both after the step, and {"loss", "norm"}; the first two are donated."""


def make_step(
    config: ModelConfig, settings: Settings, optimiser: optax.GradientTransformation, mesh: jax.sharding.Mesh, spread: Any = None
) -> Step:
    """The jitted step. The loss is the mean over all response tokens of the step, whatever the microbatches.

    Args:
        spread: shardings of the optimiser's moments and of `trained` itself, where they differ; None: as `trained`.
    """

    def loss(trained: Any, frozen: Params, batch: Batch) -> jax.Array:
        return response_loss(config, trained_params(config, settings, trained, frozen), batch, settings.remat)

    def step(trained: Any, state: Any, frozen: Params, batches: Batch) -> tuple[Any, Any, dict[str, jax.Array]]:
        tokens = batches.weight.sum()
        total, grads = _gradients(loss, mesh, None if spread is None else spread[0], trained, frozen, batches)
        grads = jax.tree.map(lambda leaf: leaf / tokens, grads)
        before = trained
        if spread is not None:  # every device updates its own part, then all get all parts
            before = jax.lax.with_sharding_constraint(trained, spread[0])
        with jax.numpy_dtype_promotion("standard"):  # optax takes powers of its step, an int32
            updates, state = optimiser.update(grads, state, before)
        after = optax.apply_updates(before, updates)
        if spread is not None:
            after = jax.lax.with_sharding_constraint(after, spread[1])
        return after, state, {"loss": total / tokens, "norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=(0, 1))


def _gradients(
    loss: Callable[[Any, Params, Batch], jax.Array], mesh: jax.sharding.Mesh, spread: Any, trained: Any, frozen: Params, batches: Batch
) -> tuple[jax.Array, Any]:
    """(loss, gradients) summed over microbatches and devices. Every device first sums its own: devices wait for each other once per step,
    not once per layer.

    Args:
        spread: shardings in which the devices keep a part each of the gradients; None: each has them whole.
    """
    specs = jax.tree.map(lambda _: jax.P(), trained) if spread is None else jax.tree.map(lambda one: one.spec, spread)

    def add_up(leaf: jax.Array, spec: jax.P) -> jax.Array:
        axis = next((axis for axis, name in enumerate(spec) if name == "data"), None)
        return jax.lax.psum(leaf, "data") if axis is None else jax.lax.psum_scatter(leaf, "data", scatter_dimension=axis, tiled=True)

    def own(trained: Any, frozen: Params, batches: Batch) -> tuple[jax.Array, Any]:
        def add(total: Any, batch: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trained, frozen, batch)), None

        if batches.weight.shape[0] == 1:
            return jax.value_and_grad(loss)(trained, frozen, jax.tree.map(lambda leaf: leaf[0], batches))
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained)
        return jax.lax.scan(add, zero, batches)[0]

    def all_devices(*given: Any) -> tuple[jax.Array, Any]:
        total, grads = own(*given)
        return jax.lax.psum(total, "data"), jax.tree.map(add_up, grads, specs)

    if mesh.size != mesh.shape["data"]:  # blocks are split over devices too: the partitioner places these sums
        total, grads = own(trained, frozen, batches)
        return total, grads if spread is None else jax.lax.with_sharding_constraint(grads, spread)
    given, found = (jax.P(), jax.P(), jax.P(None, "data")), (jax.P(), specs)
    return jax.shard_map(all_devices, mesh=mesh, in_specs=given, out_specs=found, check_vma=False)(trained, frozen, batches)


def make_evaluation(config: ModelConfig, settings: Settings) -> Callable[[Any, Params, Batch], jax.Array]:
    """The jitted sum of losses of one batch, without gradients."""
    still = replace(settings, remat=False)
    return jax.jit(lambda trained, frozen, batch: response_loss(config, trained_params(config, still, trained, frozen), batch))
