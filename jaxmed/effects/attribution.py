"""First-order effects of neurons: what they change times how the outcome answers to it, at the base run.

Attribution patching (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745): the gradient of the outcome at the base run, taken once for a whole
layer, stands for a restarted run of every unit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.effects.engine import PreparedContrast, Window
from jaxmed.effects.readout import Readout, Reads
from jaxmed.effects.rows import Picks, View, after_module
from jaxmed.models.config import ModelConfig
from jaxmed.models.params import Params
from jaxmed.models.transformer import matrix_rows
from jaxmed.runner import Restart, run


def neuron_attribution(prepared: PreparedContrast, window: Window, layer: int, readout: Readout) -> jax.Array:
    """First-order indirect effects float32 [F] of the neurons of a layer, on the first outcome of `readout`.

    Args:
        prepared: its records hold the site "neuron".
    """
    model = prepared.contrast.base.model
    return _attribution(model.config, model.params, window.restart, window.view, layer, window.reads, readout)


@partial(jax.jit, static_argnames=("config", "layer", "readout"))
def _attribution(
    config: ModelConfig, params: Params, restart: Restart, view: View, layer: int, reads: Reads, readout: Readout
) -> jax.Array:
    here = Picks(jnp.zeros(1, jnp.int32), jnp.full(1, layer, jnp.int32), jnp.zeros(1, jnp.int32))
    later = {**params, "blocks": jax.tree.map(lambda x: x[layer + 1 :], params["blocks"])}
    prefix = replace(restart.prefix, key=restart.prefix.key[layer + 1 :], value=restart.prefix.value[layer + 1 :])

    def outcome(change: jax.Array) -> jax.Array:
        stream = after_module(config, params, view, here, "mlp", change)
        if layer + 1 < config.layers:
            stream = run(config, later, stream, restart.layout, first=layer + 1, prefix=prefix).stream
        return readout(config, params, stream[:, reads.slots], reads)[0, 0]

    width = len(view.slots), config.width
    gradient = jax.grad(outcome)(jnp.zeros((1, *width), jnp.float32))[0]  # by what the MLP adds, before its norm
    written = matrix_rows(config, params, "down", jnp.full(config.neurons, layer), jnp.arange(config.neurons))
    values = (view.at(record, "neuron", here.layer)[0] for record in (view.source, view.base))
    delta = jnp.where(view.patched[0, :, None], jnp.subtract(*values), 0.0)
    if config.experts:
        delta *= view.at(view.base, "routing", here.layer)[0][:, np.arange(config.neurons) // config.sizes["M"]]
    return jnp.einsum("TF,TD,FD->F", delta, gradient, written.astype(jnp.float32), precision="highest")
