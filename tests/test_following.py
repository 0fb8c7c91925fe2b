"""Text that one model writes while units keep another model's values, against whole forward passes of both."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.generation import Following, generate_ids
from jaxmed.interventions.edits import Edit
from jaxmed.models.load import from_params
from jaxmed.models.model import Model
from tests import tiny

PROMPTS = [np.arange(3, 3 + count) for count in (5, 9, 7)]
SITES = ("neuron", "head_out", "mlp_out")


def sibling(model: Model) -> Model:
    """The same sizes, other weights."""
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), model.params)
    return from_params(model.config, params, model.mesh, "sibling", model.tokenizer)


def choose(model: Model, site: str) -> np.ndarray:
    """bool [L,B,n]: other units for every prompt."""
    units = {"neuron": model.config.neurons, "head_out": model.config.heads, "mlp_out": 1}[site]
    return np.random.default_rng(2).random((model.config.layers, len(PROMPTS), units)) < 0.4


def by_hand(model: Model, other: Model, site: str, chosen: np.ndarray, prompt: np.ndarray, where: str, most: int = 6) -> list[int]:
    """One prompt, by whole passes of both models for every token; chosen: bool [L,n]."""
    ids = list(prompt)
    for _ in range(most):
        _, taps = jm.forward(other, [ids], taps=(site,))
        values = np.asarray(taps[site])  # [L,1,T,...]
        gate = np.zeros(values.shape[:3] + (chosen.shape[1],) + (1,) * (values.ndim - 4), np.float32)
        columns = {
            "both": slice(len(prompt) - 1, None),
            "prompt": slice(len(prompt) - 1, len(prompt)),
            "generated": slice(len(prompt), None),
        }
        gate[:, 0, columns[where]] = chosen.reshape(len(chosen), 1, chosen.shape[1], *(1,) * (values.ndim - 4))
        logits, _ = jm.forward(model, [ids], edits={site: Edit(gate, values)})
        ids.append(int(np.asarray(logits)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("where", ["both", "prompt", "generated"])
@pytest.mark.parametrize("site", SITES)
def test_text_is_that_of_whole_passes_of_both_models(plain_model: Model, site: str, where: str) -> None:
    other, chosen = sibling(plain_model), choose(plain_model, site)
    found = generate_ids(plain_model, PROMPTS, 6, follow=Following(other, {site: chosen}), where=where, stops=[])
    expected = [by_hand(plain_model, other, site, chosen[:, row], prompt, where) for row, prompt in enumerate(PROMPTS)]
    assert [ids.tolist() for ids in found] == expected
    assert expected != [ids.tolist() for ids in generate_ids(plain_model, PROMPTS, 6, stops=[])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["post_norm", "windowed_biased", "mixture"])
def test_other_families(name: str) -> None:
    model = tiny.model(name)
    other, chosen = sibling(model), choose(model, "neuron")
    found = generate_ids(model, PROMPTS, 6, follow=Following(other, {"neuron": chosen}), stops=[])
    assert [ids.tolist() for ids in found] == [
        by_hand(model, other, "neuron", chosen[:, row], prompt, "both") for row, prompt in enumerate(PROMPTS)
    ]


def test_everything_copied_is_the_other_model(plain_model: Model) -> None:
    other, all_of_it = sibling(plain_model), np.ones((plain_model.config.layers, len(PROMPTS), 1), bool)
    params = {**plain_model.params, "blocks": other.params["blocks"]}
    mixed = from_params(plain_model.config, params, plain_model.mesh, "mixed", plain_model.tokenizer)
    chosen = {"residual_out": all_of_it}
    found = generate_ids(plain_model, PROMPTS, 6, follow=Following(mixed, chosen), stops=[])
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in generate_ids(mixed, PROMPTS, 6, stops=[])]


def test_a_sample_depends_on_its_own_seed_alone(plain_model: Model) -> None:
    how: dict[str, Any] = {"temperature": 1.0, "stops": []}
    several = generate_ids(plain_model, [PROMPTS[0]] * 4, 6, seed=[7, 8, 7, 9], **how)
    assert several[0].tolist() == several[2].tolist()
    assert several[0].tolist() != several[1].tolist()
    assert generate_ids(plain_model, PROMPTS[:1], 6, seed=[9], **how)[0].tolist() == several[3].tolist()


def test_what_cannot_follow_is_refused(plain_model: Model) -> None:
    other = sibling(plain_model)
    chosen = {"neuron": choose(plain_model, "neuron")}
    with pytest.raises(jm.UserError, match="not both"):
        generate_ids(plain_model, PROMPTS, 2, follow=Following(other, chosen), edits=jm.edits.zero("neuron", layer=0, unit=1))
    with pytest.raises(jm.UserError, match="same sizes alone; here F: 24 and 32"):
        generate_ids(plain_model, PROMPTS, 2, follow=Following(tiny.model("mixture"), chosen))
    with pytest.raises(jm.UserError, match=r"jm\.Following"):
        generate_ids(plain_model, PROMPTS, 2, follow=other)  # pyright: ignore[reportArgumentType]
    with pytest.raises(jm.UserError, match="site 'nosuch'"):
        generate_ids(plain_model, PROMPTS, 2, follow=Following(other, {"nosuch": chosen["neuron"]}))
    with pytest.raises(jm.UserError, match="24 units, or 1"):
        generate_ids(plain_model, PROMPTS, 2, follow=Following(other, {"neuron": chosen["neuron"][:, :, :5]}))
    with pytest.raises(jm.UserError, match="3 layers, 2 prompts"):
        generate_ids(plain_model, PROMPTS[:2], 2, follow=Following(other, chosen))
