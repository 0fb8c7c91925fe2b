"""Natural direct and indirect effects against full forwards, and the identities between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.job import make_job
from jaxmed.effects.request import Request
from jaxmed.effects.sweep import run_sweep
from jaxmed.errors import Notice
from jaxmed.models.model import Model
from jaxmed.results import open_results
from tests import naive, tiny, tolerances

ALL = ("indirect", "direct", "total", "interaction")


def _sweep(model: Model, tmp_path, request: Request, source_model: Model | None = None):
    run_sweep(make_job(model, tiny.PAIRS[:1], request, source_model), tmp_path / "run")
    return open_results(tmp_path / "run").load()


def test_direct_effects_equal_full_forwards_of_the_turned_pair(plain_model: Model, tmp_path) -> None:
    """y(source; M := M(base)) - y(base), from naive patching of the source run."""
    table = _sweep(plain_model, tmp_path, Request(units=("neuron", "mlp_out"), estimands=ALL))
    pair = tiny.PAIRS[0]
    turned = replace(pair, base=pair.source, source=pair.base)
    y_base = naive.outcome(plain_model, pair, "base", "log-odds")
    y_source = naive.outcome(plain_model, pair, "source", "log-odds")
    for layer, index in ((0, 3), (1, 20), (2, 7)):
        patched = y_source + naive.effects(plain_model, turned, "last", "neuron", layer, index, "log-odds", 1)[0]
        assert float(table.neuron_direct[0, layer, index]) == pytest.approx(patched - y_base, abs=tolerances.EFFECTS)
    for unit in ("neuron", "mlp_out"):
        whole = table[f"{unit}_direct"] + table[unit] + table[f"{unit}_interaction"]
        assert np.abs(whole - table[f"{unit}_total"]).max() <= tolerances.EFFECTS
        assert np.abs(table[f"{unit}_total"] - (y_source - y_base)).max() <= tolerances.EFFECTS
    assert float(np.abs(table.neuron_interaction).max()) > 10 * tolerances.EFFECTS


def test_direct_effects_alone_need_no_pass_into_base(plain_model: Model, tmp_path) -> None:
    alone = _sweep(plain_model, tmp_path / "alone", Request(units=("mlp_out",), estimands=("direct",)))
    whole = _sweep(plain_model, tmp_path / "whole", Request(units=("mlp_out",), estimands=ALL))
    for name in ("mlp_out_direct", "base_outcome", "source_outcome"):
        assert np.abs(alone[name] - whole[name]).max() <= tolerances.EFFECTS
    assert "mlp_out" not in alone


def test_the_reverse_direction_is_the_sweep_of_the_turned_pair(plain_model: Model, tmp_path) -> None:
    pair = tiny.PAIRS[0]
    turned = jm.sweep(plain_model, [replace(pair, base=pair.source, source=pair.base)], unit="head_out")
    found = _sweep(plain_model, tmp_path, Request(units=("head_out",), direction="reverse"))
    assert np.array_equal(found.head_out.values, turned.head_out.values)
    assert found.attrs["direction"] == "reverse"


def test_a_source_model_gives_its_values_on_the_same_tokens(plain_model: Model, tmp_path) -> None:
    """The last residual stream carries the whole difference between two models that share their head."""
    other = tiny.model("llama")
    blocks = {name: stack * 1.1 if name == "down" else stack for name, stack in other.params["blocks"].items()}
    other = replace(other, params={**other.params, "blocks": blocks}, history=({"kind": "scaled"},))
    request = Request(units=("residual_out", "neuron"), contrast="model")
    table = _sweep(plain_model, tmp_path, request, other)
    total = float(table.source_outcome[0] - table.base_outcome[0])
    assert abs(total) > 10 * tolerances.EFFECTS
    assert float(table.residual_out[0, -1]) == pytest.approx(total, abs=tolerances.EFFECTS)
    with pytest.warns(Notice, match="has the weights of"):
        same = _sweep(plain_model, tmp_path / "same", request, plain_model)
    assert float(np.abs(same.neuron).max()) <= float(same.noise_floor.max() if "noise_floor" in same else 1e-5) + 1e-5
    with pytest.raises(jm.UserError, match="source model"):
        make_job(plain_model, tiny.PAIRS[:1], request)


def test_openings_of_one_request_make_a_contrast(plain_model: Model) -> None:
    pair = replace(tiny.PAIRS[0], base_prefill="No", source_prefill="Ok")
    contrast = make_contrast(plain_model, pair, Reading("prefill", "last", "chat", ("log-odds",)))
    assert len(contrast.base.ids) == len(contrast.source.ids)
    assert (contrast.base.ids != contrast.source.ids).sum() == 2
    for same in ("", "No"):
        with pytest.raises(jm.UserError, match="no two openings to compare"):
            make_job(plain_model, [replace(pair, base_prefill=same, source_prefill=same)], replace(Request(), contrast="prefill"))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"estimands": ("inderect",)}, "Did you mean 'indirect'"), ({"direction": "back"}, "forward"), ({"contrast": "twin"}, "prefill")],
)
def test_unknown_words_are_refused(plain_model: Model, change: dict, said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        make_job(plain_model, tiny.PAIRS[:1], replace(Request(), **change))
