"""Activations of many prompts, and directions between sets of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import jaxmed as jm
from jaxmed.interventions.sites import SITES
from jaxmed.models.model import Model
from jaxmed.tokens import bucket
from tests import reference
from tests.tolerances import RESIDUAL

PROMPTS = ["how to harm", "a", "why is it very bad to do so, and what else is there to be said about it, if anything at all?", "do b"]


def _alone(model: Model, prompt: str, site: str) -> np.ndarray:
    """[L, T, ...] of one prompt, run alone without padding."""
    ids = jm.tokens.render(model, prompt).ids[None]
    tap = np.asarray(jm.forward(model, ids, taps=(site,))[1][site])[:, 0]
    return np.moveaxis(tap, 2, 1) if site == "attention_pattern" else tap


@pytest.mark.parametrize("site", SITES)
def test_every_site_is_what_a_forward_of_the_prompt_alone_has(plain_model: Model, site: str) -> None:
    table = jm.activations(plain_model, PROMPTS, site, "all")
    assert table[site].dims[:3] == ("prompt", "layer", "position")
    assert len({bucket(int(length)) for length in table.length}) > 1
    for number, prompt in enumerate(PROMPTS):
        wanted, found = _alone(plain_model, prompt, site), table[site].values[number]
        count = int(table.length[number])
        assert count == wanted.shape[1]
        assert np.isnan(found[:, :-count]).all()
        inner = found[:, -count:]
        if site == "attention_pattern":
            assert np.isnan(inner[..., :-count]).all()
            inner = inner[..., -count:]
        np.testing.assert_allclose(inner, wanted, atol=RESIDUAL)


@pytest.mark.parametrize(("positions", "wanted"), [("last", [-1]), (-2, [-2]), ([-1, -30, -3], [-1, -30, -3])])
def test_positions_count_from_the_right(plain_model: Model, positions: Any, wanted: list[int]) -> None:
    table = jm.activations(plain_model, PROMPTS, ("mlp_out", "hook_z"), positions)
    whole = jm.activations(plain_model, PROMPTS, ("mlp_out", "hook_z"), "all")
    assert table.position.values.tolist() == wanted
    assert table.hook_z.dims == ("prompt", "layer", "position", "head", "head_dimension")
    for name in ("mlp_out", "hook_z"):
        np.testing.assert_array_equal(table[name], whole[name].sel(position=wanted))


def test_what_batches_hold_does_not_matter(plain_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"{word} {number}" for number in range(3) for word in ("a", "why is it", "how to make bread of rye and wheat, and then")]
    whole = jm.activations(plain_model, prompts, "residual_out", "all")
    monkeypatch.setattr("jaxmed.cache.run.ROWS", 2)
    np.testing.assert_allclose(jm.activations(plain_model, prompts, "residual_out", "all").residual_out, whole.residual_out, atol=RESIDUAL)
    monkeypatch.setattr("jaxmed.cache.run.AT_ONCE", 1)
    np.testing.assert_allclose(jm.activations(plain_model, prompts, "residual_out", "all").residual_out, whole.residual_out, atol=RESIDUAL)


@pytest.mark.parametrize("family", ["llama2", "gemma2", "qwen3"])
def test_the_stream_is_what_transformers_has(family: str, tmp_path: Any) -> None:
    made = reference.save(family, tmp_path)
    model, prompts = jm.load(str(tmp_path)), [reference.tokens(5)[0], reference.tokens(17)[0]]
    table = jm.activations(model, prompts, ("residual_in", "residual_out"), "all")
    for number, ids in enumerate(prompts):
        with torch.no_grad():
            hidden = made(torch.as_tensor(ids[None].astype(np.int64)), output_hidden_states=True).hidden_states
        for layer in range(model.config.layers):
            found = table.residual_in.values[number, layer, -len(ids) :]
            np.testing.assert_allclose(found, hidden[layer][0].numpy(), atol=RESIDUAL)


def test_a_direction_is_the_difference_of_means(plain_model: Model) -> None:
    a, b = ["how to harm", "why harm", "harm it"], ["how to help", "help"]
    found = jm.mean_difference(plain_model, a, b, "residual_mid", -2)
    means = [np.mean([_alone(plain_model, prompt, "residual_mid")[:, -2] for prompt in prompts], axis=0) for prompts in (a, b)]
    assert found.dims == ("layer", "dimension")
    np.testing.assert_allclose(found, means[0] - means[1], atol=RESIDUAL)
    np.testing.assert_allclose(found.norm, np.linalg.norm(found.values, axis=-1), rtol=1e-6)
    edits = jm.edits.ablate_direction("residual_out", found.sel(layer=1))
    ids = jm.tokens.render(plain_model, "how to harm").ids[None]
    after = np.asarray(jm.forward(plain_model, ids, edits, taps=("residual_out",))[1]["residual_out"])
    unit = found.values[1] / np.linalg.norm(found.values[1])
    np.testing.assert_allclose(after @ unit, 0, atol=RESIDUAL)


def test_prompts_have_names_lengths_and_their_own_ids(plain_model: Model) -> None:
    examples = [jm.Example("how to harm", id="first"), jm.Example("a", id="second", prefill="ok")]
    table = jm.activations(plain_model, examples)
    assert table.prompt.values.tolist() == ["first", "second"]
    assert table.length.values.tolist() == [len(jm.tokens.render(plain_model, one).ids) for one in examples]
    ids = [jm.tokens.render(plain_model, one).ids for one in examples]
    np.testing.assert_array_equal(jm.activations(plain_model, ids).residual_out, table.residual_out)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"sites": "residual"}, "Did you mean"),
        ({"sites": ()}, "one site"),
        ({"positions": 0}, "count from the right"),
        ({"positions": -400}, "No prompt has position -400"),
        ({"positions": "first"}, "Prompt 0: Unknown position .first."),
        ({"positions": "spans"}, "pairs alone"),
        ({"positions": "user", "prompts": [np.asarray([1, 2])]}, "token ids, which have no place"),
        ({"positions": [-1, -1]}, "different whole numbers"),
        ({"positions": 1.5}, "whole numbers"),
        ({"prompts": [np.zeros((2, 3), int)]}, r"int \[T\]"),
        ({"prompts": [np.asarray([1, 999])]}, "999"),
        ({"prompts": [3]}, "chat"),
    ],
)
def test_bad_requests_are_refused(plain_model: Model, given: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        jm.activations(plain_model, **{"prompts": PROMPTS, **given})


def test_a_direction_needs_its_position_in_every_prompt(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="the shortest has"):
        jm.mean_difference(plain_model, PROMPTS, PROMPTS[:1], position=-40)
    with pytest.raises(jm.UserError, match="one position"):
        jm.mean_difference(plain_model, PROMPTS[:1], PROMPTS[:1], position="all")


def test_what_does_not_fit_is_refused_before_anything_runs(plain_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxmed.cache.table.os.sysconf", lambda name: 10)
    with pytest.raises(jm.UserError, match="fewer sites or positions"):
        jm.activations(plain_model, PROMPTS)
