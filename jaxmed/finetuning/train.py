"""One optimiser step: response-only cross-entropy through the decoder, gradients of what is trained alone, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmed.errors import UserError, unknown
from jaxmed.finetuning.batches import Batch, batch_layout
from jaxmed.finetuning.lora import Lora, adapted_rules, lay_out, with_factors
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.transformer import Params, as_logits, final_norm, head, param_dtype
from jaxmed.runner import run_blocks

METHODS = ("lora", "full")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned.

    Attributes:
        method: "lora" (adapters on the blocks' matrices) or "full" (every parameter).
        lora: of the adapters.
        learning_rate: at its highest.
        schedule: after the warm-up: "constant", or down to zero at the last step as "linear" or "cosine".
        warmup: steps in which the learning rate rises from zero.
        epochs: passes over the data; `steps`, where given, counts instead.
        batch: examples per optimiser step; `accumulate` microbatches make up one.
        clip: largest global norm of a gradient; 0: no clipping.
        weight_decay: of AdamW, on matrices alone.
        beta1, beta2, epsilon: of AdamW.
        packing: several examples may share a row of tokens, without seeing each other.
        plain: prompt, newline, response, instead of the chat template.
        max_length: limit of an example's tokens; 0: the model's.
        remat: keep the residual stream alone between blocks, and run every block again for its gradient.
        evaluate_every: steps between held-out losses; 0: a tenth of the steps.
        patience: stop after so many held-out losses without a new best, and return the best; 0: never.
        save_every: steps between checkpoints; 0: a fifth of the steps.
        seed: of the data's order and of fresh adapters.
    """

    method: str = "lora"
    lora: Lora = field(default_factory=Lora)
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup: int = 10
    epochs: float = 1.0
    steps: int = 0
    batch: int = 8
    accumulate: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    packing: bool = True
    plain: bool = False
    max_length: int = 0
    remat: bool = False
    evaluate_every: int = 0
    patience: int = 0
    save_every: int = 0
    seed: int = 0

    def check(self, config: ModelConfig) -> None:
        """Raises a UserError for values that cannot be used."""
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        positive = ("learning_rate", "epochs", "batch", "accumulate", "epsilon")
        wrong = [f"{name} is {getattr(self, name)}; it is above 0" for name in positive if not getattr(self, name) > 0]
        others = ("warmup", "steps", "clip", "weight_decay", "max_length", "evaluate_every", "patience", "save_every")
        wrong += [f"{name} is {getattr(self, name)}; it is not negative" for name in others if not getattr(self, name) >= 0]
        wrong += [
            f"{name} is {getattr(self, name)}; it is from 0 to below 1" for name in ("beta1", "beta2") if not 0 <= getattr(self, name) < 1
        ]
        if self.accumulate > self.batch:
            wrong.append(f"accumulate is {self.accumulate}, more than the batch of {self.batch} examples")
        if self.max_length > config.max_length:
            wrong.append(f"max_length is {self.max_length}; this model takes {config.max_length} tokens")
        if wrong:
            raise UserError("Settings of fine-tuning: " + "; ".join(wrong) + ".")
        if self.method == "lora":
            adapted_rules(config, self.lora)
        elif config.int8:
            raise UserError("A model kept as int8 is fine-tuned by --method lora only.")


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


def response_loss(config: ModelConfig, params: Params, batch: Batch, remat: bool = False) -> jax.Array:
    """Sum over the scored tokens of minus their log-probability; the unembedding runs on those tokens alone."""
    h, _ = run_blocks(config, params, batch.tokens, batch_layout(batch), remat=remat)
    x = final_norm(config, params, jnp.take_along_axis(h, batch.column[..., None], 1))
    logits = as_logits(config, contract("BRD,VD->BRV", x, head(params)))
    own = as_logits(config, contract("BRD,BRD->BR", x, head(params)[batch.target]))
    return ((jax.nn.logsumexp(logits, axis=-1) - own) * batch.weight).sum()


def trained_params(config: ModelConfig, settings: Settings, trained: Any, frozen: Params) -> Params:
    """The parameters that the decoder runs on, from what is trained (float32) and what is not."""
    if settings.method == "lora":
        return with_factors(frozen, lay_out(config, settings.lora, trained))
    return jax.tree.map_with_path(lambda path, leaf: leaf.astype(param_dtype(config, path[-1].key)), trained)


def split_params(settings: Settings, params: Params, factors: Any) -> tuple[Any, Params]:
    """(trained, frozen): adapters and the whole model, or float32 copies of all parameters and nothing."""
    if settings.method == "lora":
        return factors, params
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params), {}


Step = Callable[[Any, Any, Params, Batch], tuple[Any, Any, dict[str, jax.Array]]]
"""(trained, optimiser state, frozen, batches [A, ...]) -> both after the step, and {"loss", "norm"}; the first two are donated."""


def make_step(config: ModelConfig, settings: Settings, optimiser: optax.GradientTransformation, spread: Any = None) -> Step:
    """The jitted step. The loss is the mean over all response tokens of the step, whatever the microbatches.

    Args:
        spread: shardings of the optimiser's moments and of `trained` itself, where they differ; None: as `trained`.
    """

    def loss(trained: Any, frozen: Params, batch: Batch) -> jax.Array:
        return response_loss(config, trained_params(config, settings, trained, frozen), batch, settings.remat)

    def step(trained: Any, state: Any, frozen: Params, batches: Batch) -> tuple[Any, Any, dict[str, jax.Array]]:
        tokens = batches.weight.sum()

        def add(total: Any, batch: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trained, frozen, batch)), None

        first = jax.tree.map(lambda leaf: leaf[0], batches)
        if batches.weight.shape[0] == 1:
            total, grads = jax.value_and_grad(loss)(trained, frozen, first)
        else:
            zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained)
            (total, grads), _ = jax.lax.scan(add, zero, batches)
        grads = jax.tree.map(lambda leaf: leaf / tokens, grads)
        before = trained
        if spread is not None:  # every device updates its own part, then all get all parts
            grads, before = (jax.lax.with_sharding_constraint(tree, spread[0]) for tree in (grads, trained))
        updates, state = optimiser.update(grads, state, before)
        after = optax.apply_updates(before, updates)
        if spread is not None:
            after = jax.lax.with_sharding_constraint(after, spread[1])
        return after, state, {"loss": total / tokens, "norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=(0, 1))


def make_evaluation(config: ModelConfig, settings: Settings) -> Callable[[Any, Params, Batch], jax.Array]:
    """The jitted sum of losses of one batch, without gradients."""
    still = replace(settings, remat=False)
    return jax.jit(lambda trained, frozen, batch: response_loss(config, trained_params(config, still, trained, frozen), batch))
