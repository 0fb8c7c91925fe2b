"""One model writes while chosen units keep the values that another model has on the same text, token by token.

The contrast of two models while they write: at every step the other model reads the text so far, its values of the chosen units are copied,
and the text goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_sharding
from jaxmed.errors import UserError, unknown
from jaxmed.generation.writers import KEEP, Batch, Edits, Place, choose_next, placed, put
from jaxmed.interventions.edits import Edit
from jaxmed.interventions.sites import SITES
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.runner import Ran, Recording, causal_layout, extend, run_tokens

Gates = dict[str, jax.Array]
"""Site -> float32 [L,B,1,...]: 1 where a row's unit is copied."""


@dataclass(frozen=True)
class Following:
    """What is copied from another model while text is written.

    Attributes:
        model: where values come from; it has the sizes and the vocabulary of the model that writes.
        chosen: site -> bool [L, B, n], which of its n units each of B prompts copies; n is 1 where a site has one.
    """

    model: Model
    chosen: Mapping[str, np.ndarray]


def check_following(model: Model, follow: Following, prompts: int, edited: bool) -> None:
    """Raises a UserError for edits beside it, for models of other sizes, and for choices of another number of prompts."""
    if not isinstance(follow, Following):
        raise UserError(f"follow is a jm.Following(model, {{site: chosen}}), not a {type(follow).__name__}.")
    if edited:
        raise UserError("Give edits or units that follow another model, not both.")
    if model.config.sizes != follow.model.config.sizes:
        differ = [
            f"{letter}: {size} and {follow.model.config.sizes[letter]}"
            for letter, size in model.config.sizes.items()
            if size != follow.model.config.sizes[letter]
        ]
        raise UserError(f"Units can follow a model of the same sizes alone; here {', '.join(differ)}.")
    for site, chosen in follow.chosen.items():
        if site not in SITES or site == "attention_pattern":
            raise unknown("site", site, [name for name in SITES if name != "attention_pattern"])
        shape, units = np.shape(chosen), model.config.sizes[SITES[site].unit]
        if shape not in {(model.config.layers, prompts, count) for count in (1, units)}:
            raise UserError(
                f"What follows at {site!r} has the shape {list(shape)}; it is [{model.config.layers} layers, {prompts} prompts, "
                f"{units} units, or 1 for all of them]."
            )


def write_following(follow: Following, where: str, model: Model, batch: Batch) -> Iterator[np.ndarray]:
    """One token of every text at each step, on all devices; `where` is "both", "prompt" or "generated"."""
    mesh, sites = model.mesh, tuple(follow.chosen)
    rows, by_layer = row_sharding(mesh), row_sharding(mesh, 1)
    batch, padding = placed(batch, rows), jax.device_put(batch.padding, rows)
    gates = {site: jax.device_put(_gate(site, chosen, len(batch.tokens)), by_layer) for site, chosen in follow.chosen.items()}
    other, other_kept = _read(follow.model.config, follow.model.params, batch.tokens, padding, {}, sites)
    last = np.zeros(batch.tokens.shape, bool)
    last[:, -1] = where != "generated"
    edits = {site: Edit(gates[site], other.taps[site], 0.0, tokens=last) for site in sites}
    here, here_kept = _read(model.config, model.params, batch.tokens, padding, edits, ())
    caches = _with_room((here_kept, other_kept), batch.room)
    place = Place(padding, np.int32(batch.tokens.shape[1]), np.int32(-1))
    token, _, place = choose_next(model.config, model.params, here.stream, place, batch.sampling)
    copied = gates if where != "prompt" else jax.tree.map(jnp.zeros_like, gates)
    while True:
        yield np.asarray(token)[None]
        models = ((model.config, follow.model.config), (model.params, follow.model.params))
        streams, caches = _step(models[0], models[1], caches, token, place, copied)
        token, _, place = choose_next(model.config, model.params, streams, place, batch.sampling)


def _gate(site: str, chosen: np.ndarray, rows: int) -> np.ndarray:
    """float32 [L,B,1,n,1...], with rows too many at zero."""
    chosen = np.asarray(chosen, bool)
    layers, prompts, units = chosen.shape
    gate = np.zeros((layers, rows, 1, units, *(1,) * (len(SITES[site].axes) - 3)), np.float32)
    gate[:, :prompts] = chosen.reshape(layers, prompts, *gate.shape[2:])
    return gate


Kept = tuple[jax.Array, jax.Array]


@partial(jax.jit, static_argnames=("config", "taps"))
def _read(
    config: ModelConfig, params: Params, tokens: jax.Array, padding: jax.Array, edits: Edits, taps: tuple[str, ...]
) -> tuple[Ran, Kept]:
    """Prompts int [B,S], padded at the left: last residual streams [B,1,D], taps at the last token [L,B,1,...]; keys and values."""
    recording = Recording(taps, keep=True)
    last = jnp.full((len(tokens), 1), tokens.shape[1] - 1)
    layout = causal_layout(tokens.shape[0], tokens.shape[1], padding)
    ran = run_tokens(config, params, tokens, layout, recording, edits=edits, columns=last)
    assert ran.kept is not None
    return ran._replace(stream=ran.stream[:, -1:], kept=None), ran.kept


@partial(jax.jit, static_argnames="room")
def _with_room(caches: tuple[Kept, Kept], room: int) -> tuple[Kept, Kept]:
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))), caches)


@partial(jax.jit, static_argnames="configs", donate_argnames="caches")
def _step(
    configs: tuple[ModelConfig, ModelConfig],
    params: tuple[Params, Params],
    caches: tuple[Kept, Kept],
    token: jax.Array,
    place: Place,
    gates: Gates,
) -> tuple[jax.Array, tuple[Kept, Kept]]:
    """Both models read the newest tokens int [B]; the first takes over what the second has at the gates -> its streams [B,1,D]."""
    layout, read = place.layout(), Recording(tuple(gates), keep=True)
    other = extend(configs[1], params[1], token[:, None], layout, place.prefix(*caches[1]), read)
    edits = {site: Edit(gate, other.taps[site], 0.0) for site, gate in gates.items()}
    here = extend(configs[0], params[0], token[:, None], layout, place.prefix(*caches[0]), KEEP, edits=edits)
    assert here.kept is not None
    assert other.kept is not None
    stored = tuple(
        (put(cache[0], new[0], place.column, 2), put(cache[1], new[1], place.column, 2))
        for cache, new in zip(caches, (here.kept, other.kept), strict=True)
    )
    return here.stream, (stored[0], stored[1])
