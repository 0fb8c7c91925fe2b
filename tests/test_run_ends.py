"""Both runs of many contrasts side by side, against the runs of each alone."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmed.effects.contrast import Reading, make_contrasts
from jaxmed.effects.engine import prepare
from jaxmed.effects.run_ends import run_ends
from tests import tiny, tolerances

OUTCOMES = {"log-odds": tiny.PAIRS, "kl": tiny.PAIRS, "prefix-gap": tiny.LONG}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_runs_side_by_side_end_as_each_does_alone(outcome: str) -> None:
    contrasts = make_contrasts(tiny.model("mixture", mesh="data=2"), OUTCOMES[outcome], Reading("pair", "last", "chat", (outcome,)))
    assert len({len(one.base.ids) for one in contrasts}) > 1
    base, source = run_ends(contrasts, (outcome,))
    assert base.shape == source.shape == (1, len(contrasts))
    for number, one in enumerate(contrasts):
        alone = prepare(one, (outcome,), ("mlp_out",))
        assert np.abs(base[:, number] - alone.base_outcome).max() <= tolerances.EFFECTS
        assert np.abs(source[:, number] - alone.source_outcome).max() <= tolerances.EFFECTS
    assert np.abs(base - source).max() > 10 * tolerances.EFFECTS
