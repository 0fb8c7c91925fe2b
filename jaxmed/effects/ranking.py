"""The strongest units of a table, as rows of `top.csv`, with the tokens that a neuron's output vector promotes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from jaxmed import results, statistics
from jaxmed.effects.mediators import EXPERT, MEDIATORS, OF_NEURON
from jaxmed.effects.unit_blocks import UnitBlocks
from jaxmed.files import write_csv
from jaxmed.models.model import Model
from jaxmed.models.transformer import head, matrix_rows

STATISTICS = ("ci_low", "ci_high", "t", "p", "p_adjusted", "q")
MARGIN = "p_margin"
WEAKEST = ("weakest_category", "weakest_mean")
COLUMNS = ["rank", "unit", "method", "verified", "layer", "index", *EXPERT, "position", "outcome", "category", "mean", "share"]
COLUMNS += [*STATISTICS, MARGIN, "pairs_agreeing", *WEAKEST, "promotes", "suppresses"]


def ranked(table: xr.Dataset, effects: xr.DataArray, found: xr.Dataset, pairs: np.ndarray, top: int) -> list[dict[str, Any]]:
    """The `top` units of one kind and outcome as rows of top.csv, ranked as `statistics.ranked_by` says.

    Args:
        effects: of all pairs.
        found: their statistics over `pairs`, with the attributes unit and outcome.
        pairs: indices of the pairs that count.
    """
    unit, outcome, mean = found.attrs["unit"], found.attrs["outcome"], found["mean"].values
    coordinate = table[unit].attrs["coordinate"]
    total, exact = _mean_total(table, outcome, pairs), table.attrs.get("method", "exact") == "exact"
    categories = _categories(table, pairs)
    first = statistics.strongest(mean, found["t"].values, found.attrs["smallest_p"])[:top]
    taken = statistics.take(UnitBlocks(effects, pairs), first)
    rows = []
    for rank, (flat, values) in enumerate(zip(first, taken.T, strict=True), 1):
        at = np.unravel_index(flat, mean.shape)
        if not np.isfinite(mean[at]):
            break
        where = {dim: found[dim].values[i].item() for dim, i in zip(found["mean"].dims, at, strict=True)}
        rows.append(
            {
                "rank": rank,
                "unit": unit,
                **({} if exact else {"method": table.attrs["method"]}),
                **_verified(table, unit, at, pairs),
                "layer": where.get("layer", ""),
                "index": where.get(coordinate, ""),
                **{name: int(found[name].values[where[OF_NEURON]]) for name in EXPERT if name in found.coords},
                "position": where.get("position", table.attrs["position"]),
                "outcome": outcome,
                "category": found.attrs["category"],
                "mean": float(mean[at]),
                "share": float(mean[at]) / total,
                **{name: float(found[name].values[at]) for name in (*STATISTICS, MARGIN) if name in found},
                "pairs_agreeing": f"{int((np.sign(values) == np.sign(mean[at])).sum())}/{len(values)}",
                **_weakest(values, table.group.values[pairs], categories, float(mean[at])),
            }
        )
    return rows


def _verified(table: xr.Dataset, unit: str, at: Sequence[Any], pairs: np.ndarray) -> dict[str, str]:
    """In how many pairs a unit's effect is exact, of a screened sweep."""
    if f"{unit}_verified" not in table:
        return {}
    exact = table[f"{unit}_verified"].transpose("pair", ...)
    return {"verified": f"{sum(int(exact[(int(pair), *at)].values) for pair in pairs)}/{len(pairs)}"}


def noise_floor(table: xr.Dataset) -> xr.DataArray:
    """Spread of the base outcome over all passes of a pair: [pair], or [outcome, pair]; NaN where effects are estimates."""
    if "base_lowest" not in table:
        return xr.full_like(table.base_outcome, np.nan)
    highest = np.maximum(table.base_highest.max("layer"), table.base_outcome)  # the full forward is one more way to the same number
    return highest - np.minimum(table.base_lowest.min("layer"), table.base_outcome)


def _mean_total(table: xr.Dataset, outcome: str, pairs: np.ndarray) -> float:
    """y(source) - y(base), as a mean over groups; NaN where it is not above the noise floor: nothing is to be divided by it then."""
    ends = table[["base_outcome", "source_outcome"]].assign(noise=noise_floor(table))
    ends = (ends.sel(outcome=outcome) if "outcome" in ends.dims else ends).isel(pair=pairs)
    totals = (ends.source_outcome - ends.base_outcome).values
    total = float(statistics.group_means(totals[:, None], table.group.values[pairs])[0].mean())
    return total if abs(total) > np.nan_to_num(ends.noise.values).max() else float("nan")


def _categories(table: xr.Dataset, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """Category -> which of the pairs are of it; empty where there is one category alone."""
    names = table.category.values[pairs]
    found = {str(name): names == name for name in dict.fromkeys(names) if name}
    return found if len(found) > 1 else {}


def _weakest(values: np.ndarray, groups: np.ndarray, categories: Mapping[str, np.ndarray], mean: float) -> dict[str, Any]:
    """The category in which a unit does least of what it does on the whole, and its mean effect there."""
    means = {name: float(statistics.group_means(values[of, None], groups[of])[0].mean()) for name, of in categories.items()}
    if not means:
        return {}
    least = min(means, key=lambda name: means[name] * np.sign(mean))
    return dict(zip(WEAKEST, (least, means[least]), strict=True))


def promoted(model: Model, layers: np.ndarray, neurons: np.ndarray, count: int = 5) -> tuple[list[list[str]], list[list[str]]]:
    """Tokens that neurons' output vectors promote and suppress most, read through the final norm's scale and the unembedding."""
    scale = model.params["final_norm"] + model.config.norm_offset
    vectors = matrix_rows(model.config, model.params, "down", jnp.asarray(layers), jnp.asarray(neurons)) * scale[None]
    logits = jnp.einsum("UD,VD->UV", vectors, head(model.params).astype(jnp.float32), precision="highest")
    most = jax.lax.top_k(logits, count)[1], jax.lax.top_k(-logits, count)[1]
    decode = model.tokenizer.decode
    return tuple([[decode([int(i)]) for i in row] for row in np.asarray(ids)] for ids in most)  # type: ignore[return-value]


def name_tokens(rows: list[dict[str, Any]], model: Model | None) -> None:
    """Adds to rows of neurons and their branches the tokens that their output vectors promote and suppress; nothing without a model and
    its tokenizer."""
    if model is None or model.tokenizer is None:
        return
    named = [row for row in rows if row["unit"] in MEDIATORS and MEDIATORS[row["unit"]].coordinate == OF_NEURON]
    if not named:
        return
    found = promoted(model, np.asarray([row["layer"] for row in named]), np.asarray([row["index"] for row in named]))
    for row, up, down in zip(named, *found, strict=True):
        row["promotes"], row["suppresses"] = (" ".join(repr(token) for token in tokens) for tokens in (up, down))


def write_top(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes top.csv; the columns of experts, categories, the margin and the method of estimates are there where a row has one."""
    some = ("method", "verified", *EXPERT, *WEAKEST, MARGIN, "category")
    write_csv(
        folder / results.TOP, rows, [name for name in COLUMNS if name not in some or any(row.get(name) not in (None, "") for row in rows)]
    )
