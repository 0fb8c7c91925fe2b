"""After a sweep: statistics into the table, ranked units into `top.csv`, tokens that a neuron's output vector promotes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from jaxmed import results, statistics
from jaxmed.effects.mediators import EXPERT, MEDIATORS
from jaxmed.effects.table import TOGETHER
from jaxmed.errors import notice
from jaxmed.files import write_csv
from jaxmed.models.model import Model
from jaxmed.models.transformer import head, matrix_rows
from jaxmed.results import NOT_FINITE
from jaxmed.runs.folder import RunFolder, hold, read_run

COLUMNS = [
    "rank",
    "unit",
    "layer",
    "index",
    *EXPERT,
    "position",
    "outcome",
    "mean",
    "share",
    "ci_low",
    "ci_high",
    "p",
    "q",
    "pairs_agreeing",
    "promotes",
    "suppresses",
]


def summarise(folder: Path, model: Model | None = None, top: int = 50, seed: int = 0) -> xr.Dataset:
    """Adds statistics and the noise floor to the table in `folder`, writes top.csv, and returns the table.

    Args:
        model: for the tokens promoted; without it, those columns stay as they are (empty in a new file).
        top: rows per unit and outcome.
    """
    table = results.open_results(folder).load()
    highest = np.maximum(table.base_highest.max("layer"), table.base_outcome)  # the full forward is one more way to the same number
    noise = highest - np.minimum(table.base_lowest.min("layer"), table.base_outcome)
    added: dict[str, Any] = {"noise_floor": (noise.dims, noise.values, {})}
    rows: list[dict[str, Any]] = []
    for unit in swept_variables(table):
        stacked = table[unit] if "outcome" in table[unit].dims else table[unit].expand_dims(outcome=[table.attrs["outcome"]])
        parts = []
        for name in stacked.outcome.values:
            part = _statistics(table, stacked.sel(outcome=name), seed)
            rows += _ranked(table, unit, str(name), stacked.sel(outcome=name), part, top)
            parts.append(part)
        joined = xr.concat(parts, "outcome") if "outcome" in table[unit].dims else parts[0]
        for name in ("mean", "ci_low", "ci_high", "p", "q"):
            added[f"{unit}_{name}"] = (joined[name].dims, joined[name].values, parts[0].attrs if name == "mean" else {})
    _name_tokens(rows, model)
    if wrong := results.not_finite(table):
        notice(f"{folder}: not finite in {', '.join(f'{count} (pair, layer) of {name}' for name, count in wrong.items())}. {NOT_FINITE}")
    with hold(folder):
        results.append(folder, added)
        _write_top(folder, rows)
        RunFolder(folder, read_run(folder), True).note(not_finite=wrong)
    return results.open_results(folder, check=False).load()


def swept_variables(table: xr.Dataset) -> list[str]:
    """The variables that hold effects: those that say which mediator they are of."""
    found = [str(name) for name in table.data_vars if "unit" in table[name].attrs]
    order = [*MEDIATORS, *TOGETHER]
    return sorted(found, key=lambda name: (order.index(table[name].attrs["unit"]), len(name)))


def _statistics(table: xr.Dataset, effects: xr.DataArray, seed: int) -> xr.Dataset:
    """Statistics of one unit kind and outcome over pairs; control pairs are left out."""
    behaviour = np.flatnonzero(table.control.values == "") if (table.control.values == "").any() else np.arange(table.sizes["pair"])
    effects = effects.isel(pair=behaviour).transpose("pair", ...)
    shape = effects.shape[1:]
    found = statistics.summarise(
        effects.values.reshape(len(behaviour), -1), table.group.values[behaviour], table.split.values[behaviour], seed=seed
    )
    fields = {"mean": found.mean, "ci_low": found.low, "ci_high": found.high, "p": found.p_adjusted, "q": found.q}
    coords = {name: effects.coords[name] for name in effects.dims if name != "pair"}
    arrays = {name: (effects.dims[1:], values.reshape(shape)) for name, values in fields.items()}
    return xr.Dataset(arrays, coords=coords, attrs={"interval": found.interval, "smallest_p": found.smallest_p})


def _ranked(table: xr.Dataset, unit: str, outcome: str, effects: xr.DataArray, found: xr.Dataset, top: int) -> list[dict[str, Any]]:
    """The `top` units by |mean effect|, as rows of top.csv."""
    ends = table[["base_outcome", "source_outcome"]]
    ends = ends.sel(outcome=outcome) if "outcome" in ends.dims else ends
    totals = (ends.source_outcome - ends.base_outcome).values
    behaviour = table.control.values == ""
    behaviour = behaviour if behaviour.any() else ~behaviour
    mean_total = float(statistics.group_means(totals[behaviour, None], table.group.values[behaviour])[0].mean())
    mean = found["mean"].values
    order = np.argsort(-np.abs(np.nan_to_num(mean)).reshape(-1), kind="stable")[:top]
    values = effects.transpose("pair", ...).values[behaviour].reshape(behaviour.sum(), -1)
    rows = []
    for rank, flat in enumerate(order, 1):
        at = np.unravel_index(flat, mean.shape)
        where = {dim: found[dim].values[i].item() for dim, i in zip(found["mean"].dims, at, strict=True)}
        if not np.isfinite(mean[at]):
            continue
        rows.append(
            {
                "rank": rank,
                "unit": unit,
                "layer": where.get("layer", ""),
                "index": where.get(table[unit].attrs["coordinate"], ""),
                **{name: int(found[name].values[where["neuron_index"]]) for name in EXPERT if name in found.coords},
                "position": where.get("position", table.attrs["position"]),
                "outcome": outcome,
                "mean": float(mean[at]),
                "share": float(mean[at]) / mean_total if mean_total else float("nan"),
                **{name: float(found[name].values[at]) for name in ("ci_low", "ci_high", "p", "q")},
                "pairs_agreeing": f"{int((np.sign(values[:, flat]) == np.sign(mean[at])).sum())}/{len(values)}",
            }
        )
    return rows


def promoted(model: Model, layers: np.ndarray, neurons: np.ndarray, count: int = 5) -> tuple[list[list[str]], list[list[str]]]:
    """Tokens that neurons' output vectors promote and suppress most, read through the final norm's scale and the unembedding."""
    vectors = matrix_rows(model.config, model.params, "down", layers, neurons) * (model.params["final_norm"] + model.config.norm_offset)
    logits = jnp.einsum("UD,VD->UV", vectors, head(model.params).astype(jnp.float32), precision="highest")
    most = jax.lax.top_k(logits, count)[1], jax.lax.top_k(-logits, count)[1]
    decode = model.tokenizer.decode
    return tuple([[decode([int(i)]) for i in row] for row in np.asarray(ids)] for ids in most)  # type: ignore[return-value]


def _name_tokens(rows: list[dict[str, Any]], model: Model | None) -> None:
    if model is None or model.tokenizer is None:
        return
    named = [row for row in rows if row["unit"] == "neuron"]
    if not named:
        return
    found = promoted(model, np.asarray([row["layer"] for row in named]), np.asarray([row["index"] for row in named]))
    for row, up, down in zip(named, *found, strict=True):
        row["promotes"], row["suppresses"] = (" ".join(repr(token) for token in tokens) for tokens in (up, down))


def _write_top(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes top.csv; the columns of experts are there where a row has one."""
    write_csv(folder / results.TOP, rows, [name for name in COLUMNS if name not in EXPERT or any(name in row for row in rows)])
