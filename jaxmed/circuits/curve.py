"""Faithfulness as a curve over circuit sizes, and the benchmark's two areas.

Mueller et al. 2025 (arXiv 2504.13151): f(C) = (m(C) - m(none)) / (m(all) - m(none)), each m a mean over pairs. CPR is the area under f over
the fraction of edges (higher is better), CMD the area between f and 1 (lower is better), by trapezoids over `FRACTIONS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Parts of all edges (or nodes), those of the benchmark; a circuit has the whole number below of them."""


@dataclass(frozen=True)
class Areas:
    """What a curve comes to.

    Attributes:
        cpr: area under faithfulness over the fraction of edges; 0.999 for a circuit that is always faithful.
        cmd: area between faithfulness and 1; 0 at best.
        average: mean of faithfulness over `FRACTIONS`.
    """

    cpr: float
    cmd: float
    average: float


def areas(faithfulness: np.ndarray) -> Areas:
    """The areas of a curve [fraction] at `FRACTIONS`."""
    cpr, cmd = (float(np.trapezoid(values, FRACTIONS)) for values in (faithfulness, np.abs(1.0 - faithfulness)))
    return Areas(cpr, cmd, float(np.mean(faithfulness)))


def faithfulness(outcome: np.ndarray, every: np.ndarray, none: np.ndarray) -> float:
    """f of one circuit, from outcomes [pair] of it, of all edges and of none; NaN where the last two have the same mean."""
    total = float(np.mean(every) - np.mean(none))
    return float(np.mean(outcome) - np.mean(none)) / total + 0.0 if total else np.nan
