"""Joint sets, paths, and the two ways to the logits, against full forwards with all their edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.engine import prepare
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.rows import Picks
from jaxmed.errors import UserError
from jaxmed.interventions.edits import merge
from jaxmed.models.model import Model
from tests import naive, tiny, tolerances

SETS = {
    "across": [("neuron", 0, 3), ("head_out", 1, 2), ("neuron", 1, 5), ("neuron", 1, 6), ("mlp_out", 2)],
    "one layer": [("neuron", 1, 1), ("neuron", 1, 7), ("window", 1, 1)],
    "modules": [("attention_out", 0), ("both_out", 1), ("residual_out", 1)],
    "a single neuron": [("neuron", 1, 5)],
    "branches": [("gate", 0, 3), ("up", 0, 3), ("up", 1, 6), ("gate", 2, 2), ("head_out", 1, 1)],
    "twice": [("neuron", 1, 5), ("neuron", 1, 5)],
}
PLACES = [("llama", "last"), *(pytest.param(kind, "user", marks=pytest.mark.slow) for kind in ("llama", "four_norms", "mixture"))]
FAMILIES = ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("four_norms", "mixture"))]
SITES = ("neuron", "gate", "up", "head_out", "attention_out", "mlp_out", "residual_out")


def _edits(model: Model, pair: jm.PromptPair, position: str, units: Any, window: int) -> dict[str, jm.Edit]:
    """All units of a set as edits of a full forward."""
    contrast = make_contrast(model, pair, Reading("pair", position, "chat", ("log-odds",)))
    (patch,) = contrast.patches
    source = jm.forward(model, contrast.source.ids, taps=SITES)[1]
    values = {site: np.asarray(source[site])[:, 0, list(patch.source)] for site in SITES}
    single = dict.fromkeys(
        (site, layer, unit)
        for kind, layer, index in units
        for site in MEDIATORS[kind].sites
        for unit in range(index * MEDIATORS[kind].width(window), (index + 1) * MEDIATORS[kind].width(window))
    )

    parts = []
    for site, layer, unit in single:
        picks = Picks(np.zeros(1, int), np.asarray([layer]), np.asarray([unit]))
        parts.append(MEDIATORS[site].edits(model.config, values, np.asarray(patch.base), picks, 1))
    return merge(*parts)


@pytest.mark.parametrize(("kind", "position"), PLACES)
def test_joint_effects_equal_full_forwards_with_all_edits(kind: str, position: str) -> None:
    model, pair = tiny.model(kind), tiny.PAIRS[0]
    table = jm.sweep(model, [pair], unit=("neuron",), position=position, window=4, sets=SETS)
    base = naive.outcome(model, pair, "base", "log-odds")
    for name, units in SETS.items():
        whole = [(unit if len(unit) == 3 else (*unit, 0)) for unit in units]
        wanted = naive.outcome(model, pair, "base", "log-odds", _edits(model, pair, position, whole, 4)) - base
        assert float(table.joint.sel(set=name)[0]) == pytest.approx(wanted, abs=tolerances.EFFECTS), name
    twice, once = (float(table.joint.sel(set=name)[0]) for name in ("twice", "a single neuron"))
    assert twice == pytest.approx(once, abs=tolerances.EFFECTS)
    alone = float(table.neuron[0, 1, 5])
    assert float(table.joint.sel(set="a single neuron")[0]) == pytest.approx(alone, abs=tolerances.EFFECTS)
    if not model.config.experts:  # there a neuron of an unused expert does nothing
        single = sum(float(table.neuron[0, layer, index]) for _, layer, index in SETS["one layer"][:2])
        assert abs(float(table.joint.sel(set="one layer")[0]) - single) > 10 * tolerances.EFFECTS


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_neurons_of_a_layer_together_are_what_its_mlp_adds(kind: str) -> None:
    model = tiny.model(kind)
    if model.config.experts:
        pytest.skip("in a mixture the experts' weights belong to the MLP's output, not to its neurons")
    every = {f"mlp {layer}": [("neuron", layer, i) for i in range(model.config.neurons)] for layer in range(model.config.layers)}
    table = jm.sweep(model, tiny.PAIRS[:2], unit="mlp_out", sets=every)
    assert np.abs(table.joint.values - table.mlp_out.values).max() <= tolerances.EFFECTS
    assert np.abs(table.mlp_out.values).max() > 10 * tolerances.EFFECTS


@pytest.mark.parametrize(("kind", "position"), PLACES)
def test_ways_to_the_logits_equal_full_forwards(kind: str, position: str) -> None:
    """`to_logits`: the unit's vector added to the last residual stream; `via_later`: the same taken out of a patched run."""
    model, pair = tiny.model(kind), tiny.PAIRS[0]
    estimands = ("indirect", "to_logits", "via_later", "both_ways")
    table = jm.sweep(model, [pair], unit=("neuron", "head_out"), position=position, estimand=estimands)
    base, last = naive.outcome(model, pair, "base", "log-odds"), model.config.layers - 1
    contrast = make_contrast(model, pair, Reading("pair", position, "chat", ("log-odds",)))
    tokens = list(contrast.patches[0].base)
    for unit, layer, index in (("neuron", 0, 3), ("neuron", last, 5), ("head_out", 1, 1), ("head_out", last, 0)):
        edits = _edits(model, pair, position, [(unit, layer, index)], 1)
        site = "residual_mid" if MEDIATORS[unit].mid else "residual_out"
        streams = [
            np.asarray(jm.forward(model, contrast.base.ids, given, taps=(site,))[1][site])[layer, 0, tokens] for given in (edits, None)
        ]
        vector = streams[0] - streams[1]
        write = {"residual_out": jm.Edit(0.0, 0.0, vector, None, jm.edits.where(last, tokens))}
        erase = {"residual_out": jm.Edit(0.0, 0.0, -vector, None, jm.edits.where(last, tokens))}
        found = {name: float(table[f"{unit}_{name}"][0, layer, index]) for name in estimands[1:]}
        assert found["to_logits"] == pytest.approx(naive.outcome(model, pair, "base", "log-odds", write) - base, abs=tolerances.EFFECTS)
        wanted = naive.outcome(model, pair, "base", "log-odds", merge(edits, erase)) - base
        assert found["via_later"] == pytest.approx(wanted, abs=tolerances.EFFECTS)
        assert sum(found.values()) == pytest.approx(float(table[unit][0, layer, index]), abs=tolerances.EFFECTS)
    assert np.abs(table.neuron_via_later[0, last]).max() <= tolerances.EFFECTS


def test_windows_of_layers_are_sets_of_their_modules(plain_model: Model) -> None:
    found = jm.sweep(plain_model, tiny.PAIRS[:1], layer_window=2)
    assert [str(name) for name in found.set.values] == [
        f"{kind} {at}-{at + 1}" for kind in ("attention_out", "mlp_out", "both_out") for at in (0, 1)
    ]
    wanted = jm.patch(plain_model, tiny.PAIRS[0], [("mlp_out", 1), ("mlp_out", 2)]).effect
    assert float(found.joint.sel(set="mlp_out 1-2")[0]) == pytest.approx(wanted, abs=tolerances.EFFECTS)
    one = jm.sweep(plain_model, tiny.PAIRS[:1], unit="both_out", layer_window=1)
    assert np.abs(one.joint.sel(set=[f"both_out {at}-{at}" for at in range(3)]).values - one.both_out.values).max() <= tolerances.EFFECTS
    for width in (4, -1):
        with pytest.raises(UserError, match="1 to 3 layers"):
            jm.sweep(plain_model, tiny.PAIRS[:1], layer_window=width)


HELD = {
    "a module": ([("neuron", 0, 3), ("head_out", 1, 2)], [("mlp_out", 1)]),
    "neurons and a head": ([("mlp_out", 0)], [("neuron", 1, 5), ("neuron", 2, 1), ("head_out", 2, 0)]),
    "of a site that is patched": ([("neuron", 0, 3), ("neuron", 1, 5)], [("neuron", 1, 6), ("neuron", 2, 5)]),
    "the stream": ([("attention_out", 0)], [("residual_out", 1)]),
}


def _held_edits(model: Model, pair: jm.PromptPair, units: Any) -> list[dict[str, jm.Edit]]:
    """Units that keep their base values, at every token."""
    ids = make_contrast(model, pair, Reading("pair", "last", "chat", ("log-odds",))).base.ids
    base = jm.forward(model, ids, taps=SITES)[1]
    values, tokens = {site: np.asarray(base[site])[:, 0] for site in SITES}, np.arange(len(ids))
    return [
        MEDIATORS[kind].edits(model.config, values, tokens, Picks(np.zeros(1, int), np.asarray([layer]), np.asarray([*index, 0][:1])), 1)
        for kind, layer, *index in units
    ]


@pytest.mark.parametrize(("kind", "position"), PLACES)
def test_held_units_keep_their_base_values_while_the_others_respond(kind: str, position: str) -> None:
    model, pair = tiny.model(kind), tiny.PAIRS[0]
    table = jm.sweep(model, [pair], position=position, sets={name: {"units": a, "held": b} for name, (a, b) in HELD.items()})
    free = jm.sweep(model, [pair], position=position, sets={name: units for name, (units, _) in HELD.items()})
    base = naive.outcome(model, pair, "base", "log-odds")
    for name, (units, held) in HELD.items():
        edits = _edits(model, pair, position, [(*unit, 0)[:3] for unit in units], 4)
        wanted = naive.outcome(model, pair, "base", "log-odds", merge(edits, *_held_edits(model, pair, held))) - base
        found = float(table.joint.sel(set=name)[0])
        assert found == pytest.approx(wanted, abs=tolerances.EFFECTS), name
        if not model.config.experts:  # there a neuron of an unused expert does nothing, held or not
            assert abs(found - float(free.joint.sel(set=name)[0])) > tolerances.EFFECTS, "holding them changes nothing here"
    assert abs(float(table.joint.sel(set="the stream")[0])) <= tolerances.EFFECTS, "nothing goes past a held residual stream"
    assert jm.patch(model, pair, [("mlp_out", 0)], position=position, held=HELD["neurons and a head"][1]).effect == pytest.approx(
        float(table.joint.sel(set="neurons and a head")[0]), abs=tolerances.EFFECTS
    )


def test_units_are_not_held_where_that_says_nothing(plain_model: Model) -> None:
    sets = {
        "both": {"units": [("neuron", 1, 5)], "held": [("neuron", 1, 5)]},
        "early": {"units": [("neuron", 1, 5)], "held": [("mlp_out", 0)]},
        "unknown": {"units": [("neuron", 1, 5)], "held": [("neuron", 99, 5)]},
    }
    with pytest.raises(
        UserError, match=r"(?s)'both'.* 1\.5 is patched and held.*'early'.*nothing is patched before it.*'unknown'.*layer 99"
    ):
        jm.sweep(plain_model, tiny.PAIRS[:1], sets=sets)
    with pytest.raises(UserError, match="held, if any"):
        jm.sweep(plain_model, tiny.PAIRS[:1], sets={"typo": {"units": [("neuron", 1, 5)], "hold": []}})


PATHS = {
    "neuron to a head": (("neuron", 0, 3), [("head_out", 1, 2)]),
    "neuron to an MLP": (("neuron", 0, 4), [("mlp_out", 1)]),
    "neuron to a neuron": (("neuron", 0, 4), [("neuron", 2, 5)]),
    "neuron to an MLP and a neuron": (("neuron", 0, 4), [("mlp_out", 1), ("neuron", 2, 5)]),
    "head to the MLP of its layer": (("head_out", 1, 1), [("mlp_out", 1)]),
    "branch to two branches": (("up", 0, 4), [("gate", 1, 2), ("up", 2, 5)]),
    "MLP to two heads": (("mlp_out", 0), [("head_out", 1, 0), ("head_out", 2, 3)]),
}


@pytest.mark.parametrize(("kind", "position"), PLACES)
def test_paths_equal_full_forwards_layer_by_layer(kind: str, position: str) -> None:
    """Each receiver is read in a full forward of its own, in which nothing but its module's input has changed."""
    model, pair = tiny.model(kind), tiny.PAIRS[0]
    table = jm.sweep(model, [pair], position=position, paths=PATHS)
    base = naive.outcome(model, pair, "base", "log-odds")
    contrast = make_contrast(model, pair, Reading("pair", position, "chat", ("log-odds",)))
    tokens, ids = list(contrast.patches[0].base), contrast.base.ids
    window = np.arange(tokens[0], len(ids))
    for name, (sender, receivers) in PATHS.items():
        unit, layer, *index = sender
        edits, site = (
            _edits(model, pair, position, [(unit, layer, *(index or [0]))], 1),
            ("residual_mid" if MEDIATORS[unit].mid else "residual_out"),
        )
        streams = [np.asarray(jm.forward(model, ids, given, taps=(site,))[1][site])[layer, 0, tokens] for given in (edits, None)]
        parts = []
        for kind_of, at, *number in receivers:
            of_mlp = kind_of in ("mlp_out", "neuron", "gate", "up")
            enters = "residual_mid" if of_mlp else "residual_in"  # attention between them stays as it was
            change = {enters: jm.Edit(0.0, 0.0, streams[0] - streams[1], None, jm.edits.where(at, tokens))}
            (read,) = MEDIATORS[kind_of].sites
            values = np.asarray(jm.forward(model, ids, change, taps=(read,))[1][read])[:, 0, window]
            picks = Picks(np.zeros(1, int), np.asarray([at]), np.asarray(number or [0]))
            parts.append(MEDIATORS[kind_of].edits(model.config, {read: values}, window, picks, 1))
        wanted = naive.outcome(model, pair, "base", "log-odds", merge(*parts)) - base
        assert float(table.path.sel(route=name)[0]) == pytest.approx(wanted, abs=tolerances.EFFECTS), name
    assert np.abs(table.path.values).max() > 10 * tolerances.EFFECTS


def test_sets_of_several_outcomes_positions_and_estimands(plain_model: Model) -> None:
    how: dict[str, Any] = {
        "outcome": ("log-odds", "logprob"),
        "position": "each",
        "estimand": ("indirect", "direct", "total", "interaction"),
    }
    table = jm.sweep(plain_model, tiny.PAIRS[:1], unit="mlp_out", sets={"m": [("mlp_out", 1)], "n": [("mlp_out", 2)]}, **how)
    for name in ("", "_direct", "_total", "_interaction"):
        joint, single = table[f"joint{name}"], table[f"mlp_out{name}"]
        assert joint.dims == ("outcome", "pair", "set", "position")
        assert np.nanmax(np.abs(joint.values - single.sel(layer=[1, 2]).values)) <= tolerances.EFFECTS


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sets": {"a": [("neuron", 99, 0)]}}, "layer 99; legal: 0 to 2"),
        ({"sets": {"a": [("neuron", 0, 9999)]}}, "index 9999"),
        ({"sets": {"a": []}}, "has no units"),
        ({"sets": {"a": [("window", 0, 0)]}, "window": 0}, "out of range"),
        ({"sets": {"a": [("nueron", 0, 0)]}}, "neuron"),
        ({"sets": {"a": [("neuron", 0)]}}, "needs an index"),
        ({"paths": {"a": (("neuron", 1, 0), [("head_out", 1, 0)])}}, "does not come after"),
        ({"paths": {"a": (("neuron", 1, 0), [])}}, "no receivers"),
        ({"sets": {"a": [("mlp_out", 0)]}, "estimand": "to_logits"}, "'to_logits'"),
    ],
)
def test_bad_sets_and_paths_are_refused_by_name(plain_model: Model, given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        jm.sweep(plain_model, tiny.PAIRS[:1], **given)


def test_one_pair_and_one_set_in_one_call(plain_model: Model) -> None:
    units = [("neuron", 0, 3), ("mlp_out", 2)]
    found = jm.patch(plain_model, tiny.PAIRS[0], units)
    wanted = naive.outcome(
        plain_model, tiny.PAIRS[0], "base", "log-odds", _edits(plain_model, tiny.PAIRS[0], "last", [units[0], (*units[1], 0)], 1)
    )
    assert found.patched == pytest.approx(wanted, abs=tolerances.EFFECTS)
    assert found.base == pytest.approx(naive.outcome(plain_model, tiny.PAIRS[0], "base", "log-odds"), abs=tolerances.EFFECTS)
    assert found.source == pytest.approx(naive.outcome(plain_model, tiny.PAIRS[0], "source", "log-odds"), abs=tolerances.EFFECTS)
    assert (found.effect, found.total) == (found.patched - found.base, found.source - found.base)
    with pytest.raises(UserError, match="needs an index"):
        jm.patch(plain_model, tiny.PAIRS[0], [("neuron", 0)])


def test_prepared_records_hold_the_stream_only_where_it_is_needed(plain_model: Model) -> None:
    contrast = make_contrast(plain_model, tiny.PAIRS[0], Reading("pair", "last", "chat", ("log-odds",)))
    assert "residual_in" not in prepare(contrast, ("log-odds",), ("neuron",)).base
    assert "residual_in" in prepare(contrast, ("log-odds",), ("neuron",), stream=True).base


def test_lost_sets_are_named_and_computed_again(plain_model: Model, tmp_path: Path) -> None:
    """Sets have no layer: they belong to the first item of their pair."""
    how: dict[str, Any] = {"unit": "mlp_out", "sets": {"a": [("mlp_out", 1)], "b": [("head_out", 2, 1)]}, "out": tmp_path / "run"}
    whole = jm.sweep(plain_model, tiny.PAIRS[:2], **how)
    chunk = tmp_path / "run" / "effects.zarr" / "joint" / "c" / "1" / "0"
    chunk.unlink()
    with pytest.raises(UserError, match="joint, pair 'unequal'"):
        jm.open_results(tmp_path / "run")
    with pytest.raises(UserError, match="joint"):
        jm.sweep(plain_model, tiny.PAIRS[:2], resume=True, **how)
    again = jm.sweep(plain_model, tiny.PAIRS[:2], resume=True, **how)
    assert np.array_equal(again.joint.values, whole.joint.values)
    assert np.array_equal(again.mlp_out.values, whole.mlp_out.values)
