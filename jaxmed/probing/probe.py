"""A probe: prefixes, standardised, with a threshold; fitted with folds, kept in a file, and applied to prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, special

from jaxmed import statistics
from jaxmed.errors import UserError, notice
from jaxmed.files import check_seal, read_json
from jaxmed.models.model import Model
from jaxmed.probing.prefixes import (
    AGREE,
    REFUSE,
    PrefixSet,
    check_prefixes,
    number_of,
    parse_prefixes,
    prefix_scores,
    prompt_digest,
    write_prefixes,
)
from jaxmed.probing.spec import FitSpec

NOISE = 1e-5
"""Spread of scores, relative to their size, that is rounding."""
FEWEST = 10
"""Prompts of each class that a fit needs."""


@dataclass(frozen=True)
class Probe:
    """A read-out of prompts.

    Attributes:
        prefixes: what is read.
        mean, spread: of the raw score on the benign prompts of the fit, in nats.
        threshold: standardised score from which on a prompt is flagged.
        slope, offset: of the logistic curve from standardised scores to the probability that a prompt is harmful, at equal classes.
        fitted: what it was fitted on and how it did there, fold by fold.
        model: the model's record, whose weights the fit saw.
    """

    prefixes: PrefixSet
    mean: float
    spread: float
    threshold: float
    slope: float
    offset: float
    fitted: dict[str, Any]
    model: dict[str, Any]

    def standardised(self, log_probabilities: np.ndarray) -> np.ndarray:
        """Scores float64 [prompts] of log-probabilities [prompts, prefixes]: above zero, refusal is likelier than after benign prompts."""
        return (raw_scores(log_probabilities, self.prefixes) - self.mean) / self.spread

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """Probability that a prompt is harmful, where both classes are as frequent."""
        return special.expit(self.slope * scores + self.offset)


def raw_scores(log_probabilities: np.ndarray, prefixes: PrefixSet) -> np.ndarray:
    """Mean refusal minus mean agreement [prompts], of log-probabilities per token [prompts, prefixes], in nats."""
    return log_probabilities[:, prefixes.of(REFUSE)].mean(axis=1) - log_probabilities[:, prefixes.of(AGREE)].mean(axis=1)


def score(model: Model, prompts: Sequence[np.ndarray], probe: Probe, report: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Standardised scores float64 [prompts] of prompts, token ids int [T] each. The model may be edited, pruned or tuned since the fit.

    Raises:
        UserError: a probe of another tokenizer.
    """
    check_prefixes(model, probe.prefixes)
    if probe.model.get("weights") not in (None, model.identity):
        notice(f"The probe was fitted on {probe.model.get('name')}, and {model.name} has other weights: the threshold may not fit.")
    return probe.standardised(prefix_scores(model, prompts, probe.prefixes, report))


def fit(
    model: Model,
    benign: Sequence[np.ndarray],
    harmful: Sequence[np.ndarray],
    prefixes: PrefixSet,
    spec: FitSpec | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Probe:
    """A probe from prompts, token ids int [T] each.

    The threshold is a quantile of the benign scores. How well it does is measured on prompts that it was not made from: every fold is
    tested with mean, spread and threshold of the others.

    Raises:
        UserError: too few prompts; prefixes of another tokenizer; scores that do not vary.
    """
    spec = spec or FitSpec()
    spec.check()
    check_counts(len(benign), len(harmful), spec)
    check_prefixes(model, prefixes)
    known = prefixes.searched & set(map(prompt_digest, [*benign, *harmful]))
    if known:
        notice(f"{len(known)} prompts of the fit are those that the openings were searched in: its rates are too good.")
    found = prefix_scores(model, [*benign, *harmful], prefixes, report)
    raw = raw_scores(found, prefixes)
    low, high = raw[: len(benign)], raw[len(benign) :]
    mean, spread, threshold = _calibrate(low, spec.fpr)
    z = ((low - mean) / spread, (high - mean) / spread)
    slope, offset = _logistic(*z)
    fitted = {"benign": len(low), "harmful": len(high), "fpr": spec.fpr, **_folds(low, high, spec)}
    fitted["prompts"] = sorted(map(prompt_digest, [*benign, *harmful]))
    return Probe(prefixes, mean, spread, threshold, slope, offset, fitted, dict(model.record))


def check_counts(benign: int, harmful: int, spec: FitSpec) -> None:
    """Raises a UserError for too few prompts of a kind, and for more folds than there are."""
    if min(benign, harmful) < FEWEST:
        raise UserError(f"A fit needs {FEWEST} benign and {FEWEST} harmful prompts at least, not {benign} and {harmful}.")
    if spec.folds > min(benign, harmful):
        raise UserError(f"--folds {spec.folds} are more than there are prompts of a kind ({min(benign, harmful)}).")


def _calibrate(benign: np.ndarray, fpr: float) -> tuple[float, float, float]:
    """Mean and spread of benign raw scores, and the standardised score that a fraction `fpr` of them exceeds."""
    mean, spread = float(benign.mean()), float(benign.std(ddof=1))
    if not spread > NOISE * max(1.0, abs(mean)) or not math.isfinite(spread):
        raise UserError("The benign prompts all have one score, so nothing can be standardised.")
    return mean, spread, float(np.quantile((benign - mean) / spread, 1 - fpr, method="higher"))


def _logistic(benign: np.ndarray, harmful: np.ndarray) -> tuple[float, float]:
    """Slope and offset of a logistic curve (Platt 1999), both classes with the same total weight, a little regularised."""

    def loss(weights: np.ndarray) -> float:
        return float(
            np.logaddexp(0, weights[0] * benign + weights[1]).mean()
            + np.logaddexp(0, -weights[0] * harmful - weights[1]).mean()
            + 1e-3 * weights[0] ** 2
        )

    found = optimize.minimize(loss, np.asarray([1.0, 0.0]))
    return float(found.x[0]), float(found.x[1])


def _folds(benign: np.ndarray, harmful: np.ndarray, spec: FitSpec) -> dict[str, Any]:
    """Rates on prompts that had no part in mean, spread and threshold."""
    rng, flagged, z = np.random.default_rng(spec.seed), ([], []), ([], [])
    parts = [np.array_split(rng.permutation(len(side)), spec.folds) for side in (benign, harmful)]
    for fold in range(spec.folds):
        kept = np.setdiff1d(np.arange(len(benign)), parts[0][fold])
        mean, spread, threshold = _calibrate(benign[kept], spec.fpr)
        for side, scores in enumerate((benign, harmful)):
            here = (scores[parts[side][fold]] - mean) / spread
            z[side].extend(here)
            flagged[side].extend(here > threshold)
    return {
        "folds": spec.folds,
        "auc": statistics.auc(np.asarray(z[1]), np.asarray(z[0])),
        "held_out_fpr": float(np.mean(flagged[0])),
        "held_out_tpr": float(np.mean(flagged[1])),
    }


def write_probe(file: Path, probe: Probe) -> None:
    """Keeps a probe as a JSON file."""
    numbers = {name: getattr(probe, name) for name in ("mean", "spread", "threshold", "slope", "offset", "fitted", "model")}
    write_prefixes(file, probe.prefixes, probe=numbers)


def read_probe(file: Path) -> Probe:
    """The probe of a file.

    Raises:
        UserError: no such file, or one that holds no probe.
    """
    held = check_seal(read_json(file, "a probe"), file)
    try:
        numbers = held["probe"]
        known = {name: number_of(numbers[name]) for name in ("mean", "spread", "threshold", "slope", "offset")}
        if not known["spread"] > 0:
            raise ValueError(f"spread is {known['spread']:g}, and it is above zero")
        return Probe(parse_prefixes(held, str(file)), fitted=dict(numbers["fitted"]), model=dict(numbers["model"]), **known)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} holds no probe ({type(error).__name__}: {error}). `jaxmed probe fit` writes such files.") from None


def as_record(probe: Probe) -> dict[str, Any]:
    """What a result notes of the probe it used."""
    return {"prefixes": [asdict(one) for one in probe.prefixes.prefixes], "threshold": probe.threshold, "model": probe.model}
