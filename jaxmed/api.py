"""The Python functions behind `import jaxmed as jm`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.core import Tracer

from jaxmed import runner
from jaxmed.effects.job import Request, make_job
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.summary import summarise
from jaxmed.effects.sweep import run_sweep
from jaxmed.errors import UserError
from jaxmed.finetuning.variants import build_variant
from jaxmed.interventions.checks import Extent, check_edits
from jaxmed.interventions.edits import Edit
from jaxmed.interventions.sites import INTERNAL, site_name
from jaxmed.models.catalog import needs_building
from jaxmed.models.load import load as load_unchecked
from jaxmed.models.model import Model
from jaxmed.parity.selfcheck import check_once
from jaxmed.prompts.pair import PromptPair
from jaxmed.tokens import check_length


def load(
    name_or_path: str,
    dtype: str | None = "float32",
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    int8: bool = False,
    template_from: str | None = None,
    adapter: str | Path | None = None,
    check: bool = True,
) -> Model:
    """Loads a model: a known name, a local folder, a .gguf file, a Hugging Face name, or what `jaxmed convert --to orbax` wrote.

    Args:
        name_or_path: see `jaxmed models` for the known names.
        dtype: "float32" or "bfloat16", for weights and matmuls. The residual stream and the outcomes are float32 in both.
        revision: branch, tag or commit on the hub, such as a training stage.
        mesh: device mesh with axes "data" and "model" (`jm.make_mesh`); by default all local devices on "data".
        int8: keep the blocks' matrices as int8 with one scale per output channel, for models that do not fit otherwise.
        template_from: a model whose chat template is used, for base models that have none.
        adapter: a LoRA adapter to merge in, as the folder that PEFT saves.
        check: run `jm.self_check` on it, once for the same weights, code and devices.

    Raises:
        UserError: unknown name, no network, or a checkpoint with any problem (all are listed together).
    """
    if needs_building(name_or_path):
        build_variant(name_or_path)
    model = load_unchecked(name_or_path, dtype, revision, mesh, int8, template_from, adapter)
    if check:
        check_once(model)
    return model


def forward(
    model: Model, tokens: Any, edits: Mapping[str, Edit] | None = None, taps: Sequence[str] = (), padding: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the model over token ids, with interventions as arguments.

    Args:
        tokens: int [B, T], or [T] for one prompt.
        edits: site -> `Edit`; see `jaxmed.kinds` for functions that make them.
        taps: sites to return, by name or TransformerLens alias.
        padding: int [B], how many tokens at the left of each row are padding; they are neither seen nor counted.

    Returns:
        logits float32 [B, T, V], and site -> activations [L, B, T, ...], under the names given in `taps`.

    Raises:
        UserError: unknown site, an edit out of range or not finite, a token id outside the vocabulary, text instead of token ids,
            more tokens than learned positions.
    """
    if isinstance(tokens, str) or (isinstance(tokens, Sequence) and any(isinstance(row, str) for row in tokens)):
        raise UserError("tokens is an int array [B, T], not text. Make it of texts: ids, padding = jm.tokens.batch(model, texts).")
    ids = jnp.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim not in (1, 2):
        raise UserError(f"tokens is an int array [B, T], not {ids.dtype} {list(ids.shape)}.")
    ids = ids[None] if ids.ndim == 1 else ids
    config = model.config
    if not isinstance(ids, Tracer) and ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocabulary:
        raise UserError(f"tokens holds ids from {int(ids.min())} to {int(ids.max())}; legal: 0 to {config.vocabulary - 1}.")
    if padding is not None and np.shape(padding) != (ids.shape[0],):
        raise UserError(f"padding is int [B] = [{ids.shape[0]}], the number of pad tokens at the left of each row.")
    if padding is None or not isinstance(padding, Tracer):
        check_length(config, ids.shape[1] - int(np.min(0 if padding is None else padding)), "tokens")
    names = tuple(name if name in INTERNAL else site_name(name) for name in taps)
    left = np.zeros(ids.shape[0], int) if padding is None else padding
    rows = None if isinstance(left, Tracer) else tuple(int(ids.shape[1] - count) for count in np.asarray(left))
    checked = check_edits(edits, Extent(config.layers, config.sizes | {"S": ids.shape[1], "T": ids.shape[1]}, rows))
    layout = runner.causal_layout(ids.shape[0], ids.shape[1], padding)
    logits, recorded = runner.forward(config, model.params, ids, layout, checked, tuple(sorted(set(names))))
    return logits, {asked: recorded[name] for asked, name in zip(taps, names, strict=True)}


def sweep(
    model: Model,
    pairs: Sequence[PromptPair],
    outcome: OutcomeName | Sequence[OutcomeName] = "log-odds",
    unit: str | Sequence[str] = "neuron",
    position: str | int = "last",
    window: int = 32,
    layers: Sequence[int] | None = None,
    form: str = "chat",
    out: str | Path | None = None,
    resume: bool = False,
    top: int = 50,
    seed: int = 0,
    report: Any = None,
) -> xr.Dataset:
    """Exact effects of every unit, with statistics over pairs.

    effect = y(base; unit := its value in source) - y(base), with y the outcome (target against foil).

    Args:
        outcome: one or several of `jaxmed.effects.outcomes.OUTCOMES`, or functions of the logits [V] after the prompt.
        unit: one or several of neuron, window, head_out, attention_out, mlp_out, residual_out.
        position: last, user_last, header, user, each, all, an index, or a substring.
        window: neurons per window, for the unit "window".
        layers: layers to sweep; all by default.
        form: how prompts are written: chat, text, plain, space or qa; see `prompts.forms`.
        out: folder for the table, run.json and top.csv; a temporary one by default.
        resume: go on with what `out` holds.
        report: called with (FLOPs done, effects done, pair id) after every layer.

    Returns:
        The result table, as an xarray dataset in memory.

    Raises:
        UserError: anything in the arguments that cannot be used; nothing has run then.
    """
    if not pairs:
        raise UserError("There are no pairs to sweep.")
    outcomes = (outcome,) if isinstance(outcome, str) or callable(outcome) else tuple(outcome)
    units = (unit,) if isinstance(unit, str) else tuple(unit)
    request = Request(outcomes, units, position, window, None if layers is None else tuple(layers), form, seed, top)
    job = make_job(model, pairs, request)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run" if out is None else Path(out)
        run_sweep(job, folder, resume, report or (lambda *_: None))
        return summarise(folder, model, top, seed)
