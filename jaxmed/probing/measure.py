"""How well a probe tells harmful from benign prompts, beside baselines, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed import statistics
from jaxmed.cache.table import activations
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.probing.prefixes import prefix_scores
from jaxmed.probing.probe import Probe
from jaxmed.runner.public import forward

AT_FPR = 0.01
BINS = 10
ROUNDS = 9
FEWEST = 4
"""Training prompts of each kind below which no direction is taken."""


@dataclass(frozen=True)
class Measured:
    """A read-out on labelled prompts.

    Attributes:
        name: of the read-out.
        auc, low, high: area under the ROC curve with a 95 % interval.
        tpr_at_fpr: harmful prompts flagged where 1 % of the benign ones are.
    """

    name: str
    auc: float
    low: float
    high: float
    tpr_at_fpr: float


def measure(name: str, benign: Sequence[float] | np.ndarray, harmful: Sequence[float] | np.ndarray) -> Measured:
    """A read-out's scores of benign and of harmful prompts, which should be higher.

    Raises:
        UserError: fewer than two prompts of a kind.
    """
    benign, harmful = np.asarray(benign), np.asarray(harmful)
    if min(len(benign), len(harmful)) < 2:
        raise UserError(f"A read-out is measured on two prompts of each kind at least, not {len(benign)} and {len(harmful)}.")
    low, high = statistics.auc_interval(harmful, benign)
    return Measured(name, statistics.auc(harmful, benign), low, high, tpr_at(benign, harmful, AT_FPR))


def tpr_at(benign: np.ndarray, harmful: np.ndarray, fpr: float) -> float:
    """The fraction of harmful prompts above the lowest threshold that at most a fraction `fpr` of the benign ones exceeds."""
    allowed = int(np.floor(fpr * len(benign)))
    return float((harmful > np.sort(benign)[::-1][allowed]).mean())


def at_threshold(probe: Probe, benign: np.ndarray, harmful: np.ndarray) -> dict[str, Any]:
    """Rates, F1 and calibration of a probe at its own threshold, on standardised scores."""
    flagged = [int((scores > probe.threshold).sum()) for scores in (benign, harmful)]
    precision = flagged[1] / sum(flagged) if sum(flagged) else 0.0
    recall = flagged[1] / len(harmful)
    p = np.concatenate([probe.probability(benign), probe.probability(harmful)])
    truth = np.repeat([0.0, 1.0], [len(benign), len(harmful)])
    return {
        "fpr": flagged[0] / len(benign),
        "fpr_interval": statistics.wilson(flagged[0], len(benign)),
        "tpr": recall,
        "tpr_interval": statistics.wilson(flagged[1], len(harmful)),
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "brier": float(np.square(p - truth).mean()),
        "calibration_error": calibration_error(p, truth),
    }


def calibration_error(p: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error: |mean probability - frequency| over ten equal bins, weighted by their prompts (Guo et al. 2017)."""
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [abs(p[place == at].mean() - truth[place == at].mean()) * (place == at).mean() for at in np.unique(place)]
    return float(np.sum(gaps))


Split = tuple[Sequence[np.ndarray], Sequence[np.ndarray]]
"""(benign, harmful) prompts, token ids int [T] each."""


def direction_baseline(model: Model, train: Split, test: Split) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores of a refusal-direction probe: the last token's residual stream along the mean difference of the training prompts.

    The layer is the one with the largest area under the ROC curve on the training prompts, halves of them against each other (Arditi et
    al. 2024 choose it by its effect instead).

    Returns:
        benign and harmful scores of the test prompts, and the layer.
    """
    known = [activations(model, side, "residual_out", "last").residual_out.values[:, :, 0].astype(np.float64) for side in train]
    halves = [[x[half::2] for x in known] for half in (0, 1)]
    areas = np.zeros(model.config.layers)
    for mine, other in (halves, halves[::-1]):
        direction = mine[1].mean(axis=0) - mine[0].mean(axis=0)  # [L, D]
        scores = [np.einsum("PLD,LD->PL", x, direction) for x in other]
        areas += [statistics.auc(scores[1][:, layer], scores[0][:, layer]) for layer in range(model.config.layers)]
    layer = int(np.argmax(areas))
    direction = known[1][:, layer].mean(axis=0) - known[0][:, layer].mean(axis=0)
    found = [activations(model, side, "residual_out", "last").residual_out.values[:, layer, 0] @ direction for side in test]
    return found[0], found[1], layer


def latency(model: Model, prompts: Sequence[np.ndarray], probe: Probe, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Median seconds of one prompt's score and of one forward of the prompt (its last logits), in turns; both compiled before."""
    if not len(prompts):
        raise UserError("There is no prompt to time.")
    prompt = sorted(prompts, key=len)[len(prompts) // 2]

    def scored() -> None:
        prefix_scores(model, [prompt], probe.prefixes)

    def read() -> None:
        np.asarray(forward(model, prompt[None], logits="last")[0])

    times: dict[str, list[float]] = {"probe": [], "forward": []}
    for at in range(ROUNDS + 1):
        for name, run in (("probe", scored), ("forward", read)):
            begun = clock()
            run()
            times[name] += [clock() - begun] * (at > 0)
    found = {name: float(np.median(several)) for name, several in times.items()}
    return {**found, "ratio": found["probe"] / found["forward"], "prompt_tokens": float(len(prompt))}
