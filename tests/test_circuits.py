"""Circuits: edge attribution and exact joint patching of edges, against a decoder written out head by head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.circuits.faithfulness import circuit_outcomes, one_pair
from jaxmed.circuits.graph import Graph, connected, graph_of
from jaxmed.circuits.rows import batch_of, check_equal, readout_of, shape_of
from jaxmed.circuits.scores import point_scores, run_ends
from jaxmed.effects.contrast import Contrast, Reading, make_contrast
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.prompts import PromptPair
from jaxmed.runs.cost import count_flops, propagate_flops
from tests import naive, tiny
from tests.naive_circuits import Naive, names_of
from tests.tolerances import EFFECTS

PAIR = PromptPair("late", "how to harm", "how to help", ("S",), ("N",))
READING = Reading("pair", "last", "chat", ("logit-diff",))


def contrast_of(model: Model, pair: PromptPair = PAIR) -> Contrast:
    return make_contrast(model, pair, READING)


def naive_of(model: Model, contrast: Contrast) -> Naive:
    (target,), (foil,) = contrast.answers.ids
    return Naive(model, contrast.base.ids, contrast.source.ids, target, foil)


def ends_of(model: Model, contrast: Contrast, outcome: str = "logit-diff") -> Any:
    """(rows, readout, both runs) of one pair."""
    rows, readout = batch_of([contrast], 1), readout_of(model, outcome)
    return rows, readout, run_ends(model.config, model.params, rows, shape_of(contrast).window, readout)


def scores_of(model: Model, contrast: Contrast, parts: tuple[float, ...]) -> np.ndarray:
    rows, readout, ends = ends_of(model, contrast)
    return np.mean([point_scores(model.config, model.params, rows, ends, np.float32(part), readout)[0] for part in parts], axis=0)


def circuits_of(model: Model, contrast: Contrast, chosen: list[np.ndarray], outcome: str = "logit-diff") -> np.ndarray:
    rows, readout, ends = ends_of(model, contrast, outcome)
    return np.asarray(circuit_outcomes(model.config, model.params, one_pair(ends, rows.reads, 0), np.stack(chosen), readout))


@pytest.fixture(scope="module", params=["llama", "windowed_biased"])
def kind(request: pytest.FixtureRequest) -> Model:
    """One pre-norm model with grouped queries and a gate; one with biases, sliding windows and no gate."""
    return tiny.model(request.param)


@pytest.mark.parametrize("points", [(1.0,), (0.5, 1.0)], ids=["eap", "eap-ig"])
def test_scores_are_those_of_loops_over_nodes(kind: Model, points: tuple[float, ...]) -> None:
    contrast, graph = contrast_of(kind), graph_of(kind.config)
    found = scores_of(kind, contrast, points)
    expected = naive_of(kind, contrast).scores(points)
    assert set(graph.edges) == set(expected)
    got = found[tuple(graph.places.T)]
    wanted = np.asarray([expected[edge] for edge in graph.edges])
    assert np.abs(wanted).max() > 1e-2
    np.testing.assert_allclose(got, wanted, atol=EFFECTS * np.abs(wanted).max())


def test_edges_are_in_the_order_and_number_of_the_benchmark() -> None:
    """GPT-2 small's graph has 32,491 edges and 158 nodes in the benchmark's example file."""
    graph = Graph(12, 12, 768)
    assert (len(graph.places), len(graph.nodes), graph.real.sum()) == (32491, 158, 32491)
    assert list(graph.edges[:4]) == ["input->a0.h0<q>", "input->a0.h0<k>", "input->a0.h0<v>", "input->a0.h1<q>"]
    assert graph.real[tuple(graph.places.T)].all()


def test_scores_of_all_edges_take_a_few_forwards(plain_model: Model) -> None:
    """Counted from the programs, with a window as long as the row; one forward per edge would be 262."""
    config, pair = plain_model.config, PromptPair("first", "abcdefgh", "xbcdefgh", ("S",), ("N",))
    contrast = make_contrast(plain_model, pair, replace(READING, form="text"))
    shape = shape_of(contrast)
    rows, readout, ends = ends_of(plain_model, contrast)
    runs = jax.make_jaxpr(partial(run_ends, config, window=shape.window, readout=readout))(plain_model.params, rows)
    point = jax.make_jaxpr(partial(point_scores, config, readout=readout))(plain_model.params, rows, ends, np.float32(1.0))
    forward = propagate_flops(config, 1, shape.length, 0, config.layers)
    assert shape.window == shape.length == len(contrast.base.ids)
    assert count_flops(runs.jaxpr) + count_flops(point.jaxpr) < 8 * forward


def test_all_edges_give_base_and_none_give_source(kind: Model) -> None:
    contrast = contrast_of(kind)
    graph, loops = graph_of(kind.config), naive_of(kind, contrast)
    found = circuits_of(kind, contrast, [graph.real, np.zeros_like(graph.real)])
    np.testing.assert_allclose(found, [loops.outcome("base"), loops.outcome("source")], atol=EFFECTS)
    assert abs(found[0] - found[1]) > 0.1


def test_circuits_are_those_of_loops_over_nodes(kind: Model) -> None:
    """Random circuits of three sizes; what is marked outside the graph's edges changes nothing."""
    contrast, rng = contrast_of(kind), np.random.default_rng(0)
    graph, loops = graph_of(kind.config), naive_of(kind, contrast)
    chosen = [rng.random(graph.real.shape) < share for share in (0.2, 0.5, 0.9)]
    expected = [loops.circuit(names_of(graph, one)) for one in chosen]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(circuits_of(kind, contrast, chosen), expected, atol=EFFECTS)
    np.testing.assert_allclose(circuits_of(kind, contrast, [connected(graph, one) for one in chosen]), expected, atol=EFFECTS)


@pytest.mark.parametrize("name", ["post_norm", "four_norms"])
def test_models_whose_heads_do_not_add_up_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="post-norm"):
        graph_of(tiny.CONFIGS[name])


def test_pairs_that_cannot_be_compared_token_by_token_are_refused(plain_model: Model) -> None:
    with pytest.raises(UserError, match=r"'unequal' has \d+ tokens in base and \d+ in source"):
        check_equal(contrast_of(plain_model, PromptPair("unequal", "a", "a b", ("S",), ("N",))))
    with pytest.raises(UserError, match="same tokens"):
        check_equal(contrast_of(plain_model, PromptPair("same", "a", "a", ("S",), ("N",))))


def test_only_edges_on_a_way_from_input_to_logits_are_connected() -> None:
    graph = Graph(2, 1, 4)
    kept = {"input->a0.h0<v>", "a0.h0->logits"}
    chosen = graph.marked([*kept, "m0->logits", "input->m1", "a1.h0->logits"])
    assert names_of(graph, connected(graph, chosen)) == kept


def test_all_edges_and_none_give_the_two_runs_in_mixtures_and_int8(tmp_path: Path) -> None:
    """Against the model's own forward; a mixture routes each token by what reaches the MLP."""
    folder = tiny.write_checkpoint(tmp_path / "model")
    narrow = jm.load(str(folder), int8=True)
    narrow.tokenizer = tiny.tokenizer()
    for model in (tiny.model("mixture"), narrow):
        contrast = contrast_of(model)
        (target,), (foil,) = contrast.answers.ids
        last = [np.asarray(jm.forward(model, side.ids)[0][0, -1]) for side in (contrast.base, contrast.source)]
        real = graph_of(model.config).real
        found = circuits_of(model, contrast, [real, np.zeros_like(real)])
        np.testing.assert_allclose(found, [one[target] - one[foil] for one in last], atol=EFFECTS)


def test_answers_of_several_tokens_are_read_behind_the_circuit(plain_model: Model) -> None:
    """Mean log-probabilities of whole answers, against one forward per answer."""
    pair = replace(tiny.LONG[0], base="how to harm", source="how to help")
    contrast = make_contrast(plain_model, pair, replace(READING, outcomes=("prefix-gap",)))
    real = graph_of(plain_model.config).real
    found = circuits_of(plain_model, contrast, [real, np.zeros_like(real)], "prefix-gap")
    expected = [naive.outcome(plain_model, pair, side, "prefix-gap") for side in ("base", "source")]
    np.testing.assert_allclose(found, expected, atol=EFFECTS)
