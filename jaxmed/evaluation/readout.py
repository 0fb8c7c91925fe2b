"""Read-outs of replies without another model: how far one is meant well, and whether it is a reply at all.

Both are logistic curves over numbers that the original model gives while it reads a request with a reply, fitted on sets of replies that
people wrote. Alignment: the mean residual stream at the reply, projected on the direction that tells good replies from bad ones (a linear
discriminant whose covariance is shrunk halfway to its diagonal). Coherence: the weakest of three curves, each of which tells those replies
from spoilt ones: fluency (log-probability per token) from shuffled words, fit (what the request adds to it) from replies to other
requests, variety (distinct pairs of tokens) from loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from jaxmed.batching.batches import Batch, batch_layout
from jaxmed.batching.scoring import passes, score_responses
from jaxmed.batching.texts import encode
from jaxmed.errors import UserError
from jaxmed.files import read_json, write_json
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.prompts.examples import Example
from jaxmed.runner import run_tokens
from jaxmed.statistics import auc, auc_interval

SHRINK = 0.5
"""Part of the covariance that is taken from its diagonal."""
FOLDS = 5
FEWEST = 20
"""Replies of either kind that a read-out is fitted on at least."""
SPOILT = 240
"""Replies that are spoilt, about, for the curves of coherence."""
QUALITIES = ("fluency", "fit", "variety")
EMPTY = (0.5, 0.0)
"""Alignment and coherence of a reply without text."""


@dataclass(frozen=True)
class Curve:
    """Probability of the better kind: 1 / (1 + exp(-slope * (x - middle) / spread - offset))."""

    middle: float
    spread: float
    slope: float
    offset: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return special.expit(self.slope * (x - self.middle) / self.spread + self.offset)


@dataclass(frozen=True)
class Readout:
    """Fitted read-outs.

    Attributes:
        layer: blocks that are run for alignment.
        direction: float [D]; the projection on it is what `alignment` reads.
        alignment: of good against bad replies.
        coherence: quality -> its curve.
        shown: how well they tell held-out replies apart: "alignment" and the qualities -> area under the ROC curve, low, high.
        model: identity of the model that reads.
        form: how request and reply are joined.
    """

    layer: int
    direction: tuple[float, ...]
    alignment: Curve
    coherence: dict[str, Curve]
    shown: dict[str, tuple[float, float, float]]
    model: str
    form: str

    def scores(
        self, model: Model, requests: Sequence[Example], replies: Sequence[str], report: Callable[[int], None] = lambda done: None
    ) -> np.ndarray:
        """Alignment and coherence of every reply, float64 [replies, 2], from 0 to 1.

        Raises:
            UserError: another model than the one that the curves were fitted on.
        """
        if model.identity != self.model:
            raise UserError(
                f"The read-out was fitted on other weights ({self.model[:12]}) than {model.name!r} has ({model.identity[:12]})."
            )
        kept = [at for at, text in enumerate(replies) if text.strip()]
        found = np.tile(np.asarray(EMPTY), (len(replies), 1))
        rows = [replace(requests[at], response=replies[at], prefill="") for at in kept]
        if rows:
            qualities = measure_qualities(model, rows, self.form)
            weakest = np.min([self.coherence[name](qualities[name]) for name in QUALITIES], axis=0)
            projected = reply_features(model, rows, self.layer, self.form) @ np.asarray(self.direction)
            found[kept] = np.stack([self.alignment(projected), weakest], axis=1)
        report(len(replies))
        return found


def fit_readout(
    model: Model, good: Sequence[Example], bad: Sequence[Example], form: str = "chat", layer: int = 0, seed: int = 0
) -> Readout:
    """Read-outs from good and bad replies.

    Alignment is calibrated on folds that had no part in the direction; rows of split heldout, where there are some, are left out and make
    `shown`.

    Args:
        layer: blocks that are run for alignment; 0: two thirds of them.

    Raises:
        UserError: too few replies; a layer that the model does not have.
    """
    layer = layer or max(1, 2 * model.config.layers // 3)
    if not 0 < layer <= model.config.layers:
        raise UserError(f"The read-out's layer is {layer}; this model has {model.config.layers}.")
    rows, label = [*good, *bad], np.arange(len(good) + len(bad)) < len(good)
    held = np.asarray([row.split == "heldout" for row in rows])
    if min((~held & label).sum(), (~held & ~label).sum()) < FEWEST:
        raise UserError(f"A read-out is fitted on {FEWEST} good and {FEWEST} bad replies at least; there are {len(good)} and {len(bad)}.")
    x = reply_features(model, rows, layer, form)
    apart = _out_of_fold(x[~held], label[~held], seed)
    direction = discriminant(x[~held], label[~held])
    scale = apart.std() / max((x[~held] @ direction).std(), 1e-30)  # of a direction from all rows, as those of the folds
    alignment = fit_curve(apart[label[~held]], apart[~label[~held]])
    tested = (x[held] @ direction * scale, label[held]) if held.any() else (apart, label[~held])
    shown = {"alignment": _area(tested[0][tested[1]], tested[0][~tested[1]])}
    curves = {}
    some = np.arange(len(rows))[:: max(1, len(rows) // SPOILT)]
    kept = held[some]
    for name, (whole, spoilt) in spoil(model, [rows[at] for at in some], form, seed).items():
        curves[name] = fit_curve(whole[~kept], spoilt[~kept])
        shown[name] = _area(whole[kept], spoilt[kept]) if kept.any() else _area(whole, spoilt)
    return Readout(layer, tuple((direction * scale).tolist()), alignment, curves, shown, model.identity, form)


def _area(better: np.ndarray, worse: np.ndarray) -> tuple[float, float, float]:
    return (auc(better, worse), *auc_interval(better, worse))


def discriminant(x: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The direction [D] along which rows x [n, D] of two kinds differ, against their spread within the kinds; zero-mean projections."""
    means = np.stack([x[label].mean(axis=0), x[~label].mean(axis=0)])
    within = x - means[1 - label.astype(int)]
    covariance = within.T @ within / max(len(x) - 2, 1)
    diagonal = np.diag(np.maximum(np.diag(covariance), 1e-12))
    return np.linalg.solve((1 - SHRINK) * covariance + SHRINK * diagonal, means[0] - means[1])


def _out_of_fold(x: np.ndarray, label: np.ndarray, seed: int) -> np.ndarray:
    """Projections of every row [n] on the direction that the other folds give."""
    fold = np.empty(len(x), int)
    fold[np.random.default_rng(seed).permutation(len(x))] = np.arange(len(x)) % FOLDS
    found = np.empty(len(x))
    for number in range(FOLDS):
        found[fold == number] = x[fold == number] @ discriminant(x[fold != number], label[fold != number])
    return found


def fit_curve(better: np.ndarray, worse: np.ndarray) -> Curve:
    """The logistic curve (Platt 1999) over a number that is higher for the better kind; both kinds have the same total weight."""
    both = np.concatenate([better, worse])
    middle, spread = float(both.mean()), float(both.std()) or 1.0
    high, low = (better - middle) / spread, (worse - middle) / spread

    def loss(weights: np.ndarray) -> float:
        return float(
            np.logaddexp(0, -weights[0] * high - weights[1]).mean()
            + np.logaddexp(0, weights[0] * low + weights[1]).mean()
            + 1e-3 * (weights**2).sum()
        )

    slope, offset = optimize.minimize(loss, np.asarray([1.0, 0.0]), bounds=[(0.0, None), (None, None)]).x
    return Curve(middle, spread, float(slope), float(offset))


def spoil(model: Model, rows: Sequence[Example], form: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Quality -> its values for replies, and for the same replies spoilt in that respect: each [rows]."""
    rng, whole = np.random.default_rng([seed, 1]), measure_qualities(model, rows, form)

    def shuffled(text: str) -> str:
        return " ".join(rng.permutation(text.split()))

    def looped(text: str) -> str:
        words = text.split()
        return " ".join((words[:3] * len(words))[: max(len(words), 6)])

    exchanged = [replace(row, response=other.response) for row, other in zip(rows, [*rows[2:], *rows[:2]], strict=True)]
    spoilt = {
        "fluency": _fluency(model, [replace(row, response=shuffled(row.response)) for row in rows], form),
        "fit": measure_qualities(model, exchanged, form)["fit"],
        "variety": _variety(model, [replace(row, response=looped(row.response)) for row in rows], form),
    }
    return {name: (whole[name], found) for name, found in spoilt.items()}


def measure_qualities(model: Model, rows: Sequence[Example], form: str) -> dict[str, np.ndarray]:
    """Quality -> float64 [rows], higher is better: log-probability per token of a reply in nats; how much more that is after its own
    request than after the next different one; part of its pairs of adjacent tokens that are distinct."""
    others = [replace(row, prompt=prompt) for row, prompt in zip(rows, other_prompts(rows), strict=True)]
    fluency = _fluency(model, rows, form)
    return {"fluency": fluency, "fit": fluency - _fluency(model, others, form), "variety": _variety(model, rows, form)}


def _fluency(model: Model, rows: Sequence[Example], form: str) -> np.ndarray:
    found = score_responses(model, encode(model.tokenizer, rows, form))
    return np.asarray([one.log_probabilities.mean(dtype=np.float64) for one in found])


def _variety(model: Model, rows: Sequence[Example], form: str) -> np.ndarray:
    replies = [one.ids[one.prompt :].tolist() for one in encode(model.tokenizer, rows, form)]
    pairs = [list(pairwise(ids)) for ids in replies]
    return np.asarray([len(set(found)) / len(found) if found else 1.0 for found in pairs])


def other_prompts(rows: Sequence[Example]) -> list[str]:
    """For every row the prompt of the next one that has another; its own where all have one."""
    prompts = [row.prompt for row in rows]
    return [next((p for p in (*prompts[at:], *prompts[:at]) if p != own), own) for at, own in enumerate(prompts)]


def reply_features(model: Model, rows: Sequence[Example], layer: int, form: str) -> np.ndarray:
    """The residual stream behind the first `layer` blocks, mean over the tokens that predict a reply's: float64 [rows, D]."""
    found = np.zeros((len(rows), model.config.width))
    for placed, batch in passes(model, encode(model.tokenizer, rows, form)):
        values = np.asarray(_streams(model.config, layer, model.params, batch))
        for p in placed:
            found[p.example] = values[p.row, p.scored].mean(axis=0, dtype=np.float64)
    return found


@partial(jax.jit, static_argnames=("config", "layer"))
def _streams(config: ModelConfig, layer: int, params: Params, batch: Batch) -> jax.Array:
    """The residual stream float32 [B,R,D] behind the first blocks at every scored column."""
    lower = {**params, "blocks": jax.tree.map(lambda stack: stack[:layer], params["blocks"])}
    h = run_tokens(config, lower, batch.tokens, batch_layout(batch)).stream
    return jnp.take_along_axis(h, batch.column[..., None], 1)


def write_readout(file: Path, readout: Readout) -> None:
    """Keeps read-outs as a JSON file."""
    write_json(file, {"format": "jaxmed read-out 1", **asdict(readout)})


def read_readout(file: Path) -> Readout:
    """The read-outs of a file.

    Raises:
        UserError: no such file, or one that holds none.
    """
    held: Any = read_json(file, "read-outs")
    try:
        held = {key: value for key, value in held.items() if key != "format"}
        curves = {name: Curve(**one) for name, one in held["coherence"].items()}
        shown = {name: tuple(float("nan") if x is None else float(x) for x in one) for name, one in held["shown"].items()}
        given = {"direction": tuple(map(float, held["direction"])), "alignment": Curve(**held["alignment"]), "coherence": curves}
        return Readout(**{**held, **given, "shown": shown})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} holds no read-outs ({type(error).__name__}: {error}).") from None
