"""What is written in the place of a unit's base value. A new patch is one row of `PATCHES`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.effects.engine import PreparedContrast
from jaxmed.effects.reference import Reference
from jaxmed.effects.rows import Record
from jaxmed.errors import UserError, check_seed, unknown

LARGEST = 1e6
"""Size of a patch's number beyond which only overflow is measured."""


@dataclass(frozen=True)
class Runs:
    """What a pair's patch is made of.

    Attributes:
        base, source: site -> activations [L, W, ...], the source's columns aligned to the base's.
        reference: of all pairs; None where the patch needs none.
        factor: see `PatchKind`.
        key: of the pair's random numbers.
        tokens: int [W], the columns' places in the base prompt.
    """

    base: Record
    source: Record
    reference: Reference | None
    factor: float
    key: jax.Array
    tokens: Any

    @property
    def known(self) -> Reference:
        """The reference, of patches that need it."""
        assert self.reference is not None
        return self.reference


@dataclass(frozen=True)
class PatchKind:
    """A way to patch.

    Attributes:
        values: (runs, site) -> what is written there, float32, broadcast to [L, W, ...].
        told: what it is, in words of the legend; `{factor}` stands for the number.
        needs: the sides whose runs of all pairs are its reference: "source", "base".
        factor: the default of a number that it takes; None where it takes none.
    """

    values: Callable[[Runs, str], jax.Array]
    told: str
    needs: tuple[str, ...] = ()
    factor: float | None = None


def _source(runs: Runs, site: str) -> jax.Array:
    return runs.source[site]


def _zero(runs: Runs, site: str) -> jax.Array:
    return jnp.zeros_like(runs.source[site])


def _mean(runs: Runs, site: str) -> jax.Array:
    return runs.known.means["source"][site][:, None]


def _noise(runs: Runs, site: str) -> jax.Array:
    base = _wide(runs.base[site])
    drawn = _drawn(jax.random.fold_in(runs.key, _number(site)), runs.tokens, base.shape)
    spread = runs.known.spread[site]
    return base + runs.factor * spread.reshape(-1, *(1,) * (base.ndim - 1)) * drawn


@partial(jax.jit, static_argnames=("shape",))
def _drawn(key: jax.Array, tokens: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers [L, W, ...] that depend on layer, token and unit, and not on how many of them are asked for."""

    def draw(layer: jax.Array, token: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, layer), token), shape[2:], jnp.float32)

    return jax.vmap(lambda layer: jax.vmap(lambda token: draw(layer, token))(tokens))(jnp.arange(shape[0]))


def _scale(runs: Runs, site: str) -> jax.Array:
    return runs.factor * _wide(runs.base[site])


def _steer(runs: Runs, site: str) -> jax.Array:
    base = _wide(runs.base[site])
    return base + runs.factor * jnp.broadcast_to(runs.known.change(site)[:, None], base.shape)


def _ablate_direction(runs: Runs, site: str) -> jax.Array:
    """The direction lies along the site's last axis: of a layer's neurons, of a head's dimensions, of the residual stream's. Where base and
    source have the same mean there is none, and nothing is removed."""
    base, change = _wide(runs.base[site]), runs.known.change(site)[:, None]
    length = jnp.linalg.norm(change, axis=-1, keepdims=True)
    unit = jnp.broadcast_to(change / jnp.where(length > 0, length, 1.0), base.shape)
    return base - (base * unit).sum(-1, keepdims=True) * unit


def _wide(values: jax.Array) -> jax.Array:
    return values.astype(jnp.float32)


PATCHES: dict[str, PatchKind] = {
    "resample": PatchKind(_source, "the source run's value"),
    "zero": PatchKind(_zero, "zero"),
    "mean": PatchKind(_mean, "the mean over the source runs of all pairs, at their patched tokens", ("source",)),
    "noise": PatchKind(
        _noise,
        "base's value plus Gaussian noise, whose standard deviation is {factor:g} times that of all values of the site and layer in the "
        "source runs, at patched tokens (of the residual stream: of the token embeddings)",
        ("source",),
        3.0,
    ),
    "scale": PatchKind(_scale, "{factor:g} times base's value", factor=2.0),
    "steer": PatchKind(
        _steer,
        "base's value plus {factor:g} times the mean of source minus base over all pairs, at their patched tokens",
        ("source", "base"),
        1.0,
    ),
    "ablate-direction": PatchKind(
        _ablate_direction,
        "base's value without its component along the mean of source minus base over all pairs, at their patched tokens (a direction among "
        "a layer's neurons, a head's dimensions, or the residual stream's)",
        ("source", "base"),
    ),
}


@dataclass(frozen=True)
class Patching:
    """A patch that was asked for.

    Attributes:
        patch: a key of `PATCHES`.
        factor: the number that it takes; None: its default, or none.
        seed: of its random numbers.
        reference: of "mean": a folder of activations; empty: the source runs of all pairs.
    """

    patch: str = "resample"
    factor: float | None = None
    seed: int = 0
    reference: str = ""

    @property
    def told(self) -> str:
        """What is written, in words."""
        kept = "the mean over the prompts and tokens of a folder of activations"
        return kept if self.reference else PATCHES[self.patch].told.format(factor=self.factor)


def check_patch(asked: Patching) -> Patching:
    """The patch, with its default number where it takes one and none is given.

    Raises:
        UserError: no such patch; a number that it does not take, or that is not finite.
    """
    if asked.patch not in PATCHES:
        raise unknown("patch", asked.patch, PATCHES)
    check_seed(asked.seed)
    if asked.reference and asked.patch != "mean":
        raise UserError(f"--reference goes with --patch mean alone, not with --patch {asked.patch}: leave it out.")
    default, factor = PATCHES[asked.patch].factor, asked.factor
    if factor is None:
        return replace(asked, factor=default)
    if default is None:
        takers = ", ".join(name for name, kind in PATCHES.items() if kind.factor is not None)
        raise UserError(
            f"--patch-factor {factor:g} does not go with --patch {asked.patch}, which takes no number; those that do: {takers}."
        )
    if not math.isfinite(factor) or abs(factor) > LARGEST:
        raise UserError(
            f"--patch-factor {factor} is out of range (at most {LARGEST:g} in size). Give another, or leave it out for {default:g}."
        )
    return replace(asked, factor=float(factor))


def with_patch(prepared: PreparedContrast, request: Patching, reference: Reference | None) -> PreparedContrast:
    """The contrast, with what the patch writes in the place of the source run's values."""
    width = next(iter(prepared.source.values())).shape[1]
    key = jax.random.fold_in(jax.random.key(request.seed), _number(prepared.contrast.pair.id))
    tokens = prepared.start + np.arange(width, dtype=np.int32)
    runs = Runs(prepared.base, prepared.source, reference, request.factor or 0.0, key, tokens)
    written = {site: PATCHES[request.patch].values(runs, site) for site in prepared.source}
    source = {site: jnp.broadcast_to(written[site], old.shape).astype(old.dtype) for site, old in prepared.source.items()}
    return replace(prepared, source=source)


def _number(text: str) -> int:
    """A text as a number that is the same everywhere."""
    return zlib.crc32(text.encode())
