"""A check of a loaded model that takes seconds and needs no reference: one short run, once without and once with an edit."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import all_problems
from jaxmed.hosts import agree
from jaxmed.interventions.edits import Edit, where
from jaxmed.models.digests import code_digest
from jaxmed.models.folders import cache_folder
from jaxmed.models.model import Model
from jaxmed.models.params import param_shapes
from jaxmed.runner import causal_layout, forward

LENGTH = 8
MOST_HASHED = 4 * 10**9
"""Bytes of files beyond which taking their digest costs more than the check."""
SUMS = ("residual_in", "attention_out", "residual_mid", "mlp_out", "residual_out")


def check_once(model: Model) -> None:
    """`self_check`, unless these weights have passed it before with this code, these devices and this JAX: programs are not compiled
    again to find the same. Passes are remembered as empty files in the cache folder."""
    if sum(state[1] for state in model.states) > MOST_HASHED or not model.states:
        return self_check(model)
    devices = f"{model.config.dtype} {dict(model.mesh.shape)} {model.mesh.devices.flat[0].device_kind} {jax.__version__}"
    passed = f"{model.identity} {devices} {code_digest(Path(__file__).parents[1])}"
    note = cache_folder() / "checked" / hashlib.sha256(passed.encode()).hexdigest()
    if agree(float(note.is_file())):
        return None
    self_check(model)
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    return None


def self_check(model: Model) -> None:
    """Checks a loaded model: parameters have their shapes, logits are finite, attention rows sum to one, the residual stream adds
    up, and an edit takes effect at its place and nowhere before it.

    Raises:
        UserError: everything that fails, together.
    """
    problems = [f"parameter {name} is {found}, not {wanted}" for name, found, wanted in _shapes(model) if found != wanted]
    if not problems:
        problems = _run(model)
    if problems:
        raise all_problems(f"Self-check of {model.name}", problems, "Do not trust its numbers; load with check=False to look closer.")


def _shapes(model: Model) -> list[tuple[str, list[int] | None, list[int] | None]]:
    wanted, found = _flat(param_shapes(model.config)), _flat(model.params)
    shape = lambda tree, name: list(tree[name].shape) if name in tree else None  # noqa: E731
    return [(name, shape(found, name), shape(wanted, name)) for name in sorted(wanted.keys() | found.keys())]


def _flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _run(model: Model) -> list[str]:
    config = model.config
    tokens = jnp.asarray([np.linspace(1, config.vocabulary - 1, min(LENGTH, config.max_length)).astype(np.int32)])
    layer, last, layout = config.layers // 2, tokens.shape[1] - 1, causal_layout(1, tokens.shape[1])

    def run(gate: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        edits = {"mlp_out": Edit(jnp.asarray([gate]), jnp.zeros(1), jnp.zeros(1), None, where(layer, last))}
        logits, taps = forward(config, model.params, tokens, layout, edits, (*SUMS, "attention_pattern"))
        return np.asarray(logits), {name: np.asarray(a, np.float32) for name, a in taps.items()}

    logits, taps = run(0.0)
    edited, after = run(1.0)
    slack = 1e-4 if config.dtype == "float32" else 3e-2
    near = lambda a, b: np.abs(a - b).max() <= slack * max(1.0, np.abs(b).max())  # noqa: E731
    checks = {
        "logits are not finite": np.isfinite(logits).all(),
        "attention rows do not sum to one": near(taps["attention_pattern"].sum(-1), np.ones(1)),
        "residual_in + attention_out is not residual_mid": near(taps["residual_in"] + taps["attention_out"], taps["residual_mid"]),
        "residual_mid + mlp_out is not residual_out": near(taps["residual_mid"] + taps["mlp_out"], taps["residual_out"]),
        "an edit does not set its site": not after["mlp_out"][layer, 0, last].any(),
        "an edit does not reach the logits": np.abs(edited[0, last] - logits[0, last]).max() > 0,
        "an edit reaches earlier tokens": near(edited[0, :last], logits[0, :last]),
    }
    return [said for said, holds in checks.items() if not holds]
