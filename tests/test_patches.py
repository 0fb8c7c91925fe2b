"""What is written in the place of base values: zero and means, against full forwards."""

from __future__ import annotations

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from tests import naive, tiny, tolerances

SITES = ("neuron", "head_out", "mlp_out")


def _written(model: Model, patch: str, position: str) -> dict[str, np.ndarray]:
    """Site -> what each patch writes, [L, ...]."""
    means = []
    for pair in tiny.PAIRS:
        contrast = make_contrast(model, pair, Reading("pair", position, "chat", ("log-odds",)))
        taps = jm.forward(model, contrast.source.ids, taps=SITES)[1]
        means.append({site: np.asarray(taps[site])[:, 0, list(contrast.patches[0].source)].mean(axis=1) for site in SITES})
    return {site: np.mean([one[site] for one in means], axis=0) * (patch == "mean") for site in SITES}


@pytest.mark.parametrize("patch", ["zero", "mean"])
@pytest.mark.parametrize("position", ["last", "header"])
def test_zero_and_mean_patches_equal_full_forwards(plain_model: Model, patch: str, position: str) -> None:
    written = _written(plain_model, patch, position)
    table = jm.sweep(plain_model, tiny.PAIRS, unit=SITES, position=position, patch=patch, sets={"two": [("neuron", 0, 3), ("mlp_out", 1)]})
    for number, pair in enumerate(tiny.PAIRS):
        contrast = make_contrast(plain_model, pair, Reading("pair", position, "chat", ("log-odds",)))
        tokens = list(contrast.patches[0].base)
        base = naive.outcome(plain_model, pair, "base", "log-odds")

        def edit(site: str, layer: int, unit: int | None, tokens=tokens) -> dict[str, jm.Edit]:
            value = written[site][layer] if unit is None else written[site][layer, unit]
            return jm.edits.resample(site, value[None], layer, tokens, jm.edits.ANY if unit is None else unit)

        for site, layer, unit in (("neuron", 0, 3), ("head_out", 1, 2), ("mlp_out", 2, None)):
            wanted = naive.outcome(plain_model, pair, "base", "log-odds", edit(site, layer, unit)) - base
            found = table[site][number, layer] if unit is None else table[site][number, layer, unit]
            assert float(found) == pytest.approx(wanted, abs=tolerances.EFFECTS)
        both = jm.edits.merge(edit("neuron", 0, 3), edit("mlp_out", 1, None))
        wanted = naive.outcome(plain_model, pair, "base", "log-odds", both) - base
        assert float(table.joint[number, 0]) == pytest.approx(wanted, abs=tolerances.EFFECTS)
    assert table.attrs["patch"] == patch
    assert "stands for" in table.neuron.attrs["formula"]


def test_patches_that_do_not_exist_or_do_not_fit_are_refused(plain_model: Model) -> None:
    with pytest.raises(UserError, match="resample, zero, mean"):
        jm.sweep(plain_model, tiny.PAIRS[:1], patch="zeros-all")
    with pytest.raises(UserError, match="--patch resample alone"):
        jm.sweep(plain_model, tiny.PAIRS[:1], patch="zero", estimand="direct")
