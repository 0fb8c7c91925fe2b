"""The mean of the gradients at both ends: both directions of attribution, exact where the model is linear, planned and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.cost import plan
from jaxmed.effects.job import make_job
from jaxmed.effects.request import Request
from jaxmed.models.model import Model
from jaxmed.runs.folder import read_run
from tests import tiny
from tests.test_estimates import linear

UNITS = ("neuron", "both_out")


def test_estimates_are_half_of_both_directions(plain_model: Model, tmp_path: Path) -> None:
    """Pairs of several shapes, which are others the other way round."""
    how: dict[str, Any] = {"unit": UNITS, "position": "user", "method": "attribution"}
    pairs = [
        replace(pair, id=f"{pair.id} {turned}", base=pair.source, source=pair.base) if turned else pair
        for pair in tiny.PAIRS[::2]
        for turned in (0, 1)
    ]
    forth, back = (jm.sweep(plain_model, pairs, direction=direction, **how) for direction in ("forward", "reverse"))
    found = jm.sweep(plain_model, pairs, **{**how, "method": "mean-gradient"}, out=tmp_path / "run")
    for unit in UNITS:
        wanted = (forth[unit].values - back[unit].values) / 2
        assert np.abs(wanted).max() > 1e-2
        assert np.abs(found[unit].values - wanted).max() <= 1e-5
    planned = plan(make_job(plain_model, pairs, Request(units=UNITS, position="user", method="mean-gradient")))
    assert planned.cost.passes == read_run(tmp_path / "run")["sessions"][0]["passes"]


@pytest.mark.parametrize("method", ["mean-gradient", "integrated"])
def test_estimates_of_a_linear_model_are_exact(method: str) -> None:
    pairs = [replace(pair, target=pair.target[:1], foil=pair.foil[:1]) for pair in tiny.PAIRS[:1]]
    exact, found = (jm.sweep(linear(), pairs, "logit-diff", UNITS, method=one) for one in ("exact", method))
    for unit in UNITS:
        assert np.abs(exact[unit].values - found[unit].values).max() <= 2e-4 * np.abs(exact[unit].values).max()


def test_other_patches_are_refused(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="--patch resample alone"):
        jm.sweep(plain_model, tiny.PAIRS, unit="mlp_out", method="mean-gradient", patch="zero")
