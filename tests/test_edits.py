"""Edits as data: merging, refusals, kinds."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.interventions.sites import ALIASES, SITES, site_name
from jaxmed.models.model import Model
from tests import tiny


def test_merged_edits_equal_one_after_the_other(plain_model: Model) -> None:
    a = jm.edits.resample("neuron", [1.0, 2.0], layer=0, position=-1, unit=[3, 4])
    b = jm.edits.scale("neuron", 0.5, layer=2, position=-1, unit=3)
    taps = jm.forward(plain_model, np.arange(6), jm.edits.merge(a, b), taps=("neuron",))[1]["neuron"]
    alone = jm.forward(plain_model, np.arange(6), a, taps=("neuron",))[1]["neuron"]
    assert taps[0, 0, -1, 3:5].tolist() == [1.0, 2.0]
    assert np.isclose(float(taps[2, 0, -1, 3]), 0.5 * float(alone[2, 0, -1, 3]), atol=1e-6)


@pytest.mark.parametrize("position", [-1, 5])
def test_merging_two_edits_of_one_entry_is_an_error(position: int) -> None:
    a = jm.edits.zero("neuron", layer=1, position=-1, unit=3)
    b = jm.edits.scale("hook_post", 2.0, layer=1, position=position)
    with pytest.raises(jm.UserError, match="same entry of site 'neuron'"):
        jm.edits.merge(a, b)


def test_merging_with_a_dense_edit_is_an_error() -> None:
    with pytest.raises(jm.UserError, match="all of it"):
        jm.edits.merge({"mlp_out": jm.Edit(1.0, 0.0)}, jm.edits.zero("mlp_out", layer=1))


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"neuron": jm.Edit(0.0, np.nan)}, "not finite"),
        ({"nuron": jm.Edit(1.0, 0.0)}, "Did you mean 'neuron'"),
        ({"mlp_raw": jm.Edit(1.0, 0.0)}, "can be read, not edited"),
        ({"neuron": jm.Edit(1.0, 0.0), "hook_post": jm.Edit(1.0, 0.0)}, "given twice"),
        (jm.edits.zero("neuron", layer=3), "layer 3; legal: 0 to 2"),
        (jm.edits.zero("head_out", unit=4), "unit 4; legal: 0 to 3"),
        (jm.edits.zero("key", unit=2), "unit 2; legal: 0 to 1"),
    ],
)
def test_edits_that_cannot_be_meant(plain_model: Model, edits: dict, said: str) -> None:
    with pytest.raises(jm.UserError) as caught:
        jm.forward(plain_model, np.arange(4), edits)
    assert said in str(caught.value)


def test_tokens_outside_the_vocabulary_are_refused(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="legal: 0 to 263"):
        jm.forward(plain_model, [[1, 264]])


def test_aliases_name_sites() -> None:
    assert {site_name(alias) for alias in ALIASES} == set(SITES)


def test_noise_is_seeded_and_steering_adds(plain_model: Model) -> None:
    run = lambda edits: np.asarray(jm.forward(plain_model, np.arange(6), edits, taps=("residual_out",))[1]["residual_out"])  # noqa: E731
    noisy = [run(jm.edits.noise("residual_out", 0.1, (1, 16), seed, layer=1, position=2)) for seed in (0, 0, 1)]
    assert np.array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])
    steered = run(jm.edits.steer("residual_out", np.ones(16), 2.0, layer=1, position=2)) - run(None)
    assert np.allclose(steered[1, 0, 2], 2.0, atol=1e-5)
    assert np.abs(steered[1, 0, :2]).max() == 0


def _seventh(model: Model, make: Any, x: Any) -> Any:
    return jm.forward(model, [[5, 6, 7]], edits=make(x), logits="last")[0][0, 0, 7]


def test_edits_of_traced_numbers_have_derivatives(plain_model: Model) -> None:
    """In a factor, a coefficient, a direction: against central differences."""
    direction = np.linspace(-1, 1, plain_model.config.width, dtype=np.float32)
    kinds: dict[str, Any] = {
        "scale": lambda x: jm.edits.scale("mlp_out", x, layer=1),
        "steer": lambda x: jm.edits.steer("residual_out", direction, x, layer=1, position=-1),
        "ablate": lambda x: jm.edits.ablate_direction("residual_mid", direction + x),
    }
    for name, make in kinds.items():
        read = partial(_seventh, plain_model, make)
        slope = float(jax.grad(read)(jnp.float32(0.5)))
        assert slope == pytest.approx((float(read(np.float32(0.51))) - float(read(np.float32(0.49)))) / 0.02, rel=0.05, abs=1e-3), name
        assert slope != 0, name
    with pytest.raises(jm.UserError, match="whole number"):
        jax.jit(lambda layer: jm.forward(plain_model, [[5]], edits=jm.edits.zero("mlp_out", layer=layer))[0])(1)


def test_sparse_edits_stay_sparse(plain_model: Model) -> None:
    """64 edits at once: no array of the program holds a dense value for every edit, layer and neuron."""
    import jax
    import jax.numpy as jnp

    from jaxmed.interventions.edits import ANY, Edit, Where
    from jaxmed.runner import causal_layout, run_tokens

    config, params, count, length = plain_model.config, plain_model.params, 64, 6

    def one(neuron, value):
        at = Where(jnp.asarray([1]), jnp.asarray([-1]), neuron[None], jnp.asarray([ANY]))
        edits = {"neuron": Edit(jnp.ones(1), value[None], jnp.zeros(1), None, at)}
        return run_tokens(config, params, jnp.arange(length)[None], causal_layout(1, length), edits=edits).stream

    program = jax.make_jaxpr(jax.vmap(one))(jnp.arange(count), jnp.ones(count))
    dense = count * config.layers * length * config.neurons

    def largest(jaxpr) -> int:
        inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for v in e.params.values() if hasattr(getattr(v, "jaxpr", v), "eqns")]
        return max([0, *(int(np.prod(v.aval.shape)) for e in jaxpr.eqns for v in e.outvars), *map(largest, inner)])

    assert largest(program.jaxpr) < dense


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"position": "last"}, "position is 'last'; a whole number, a list of them, or \"current\""),
        ({"position": 1.5}, "position is 1.5; a whole number"),
        ({"layer": True}, "layer is True; a whole number"),
        ({"layer": None}, "layer is None; a whole number"),
        ({"unit": 2**40}, "unit is 1099511627776; a whole number"),
        ({"layer": float("nan")}, "layer is nan; a whole number"),
        ({"layer": [0, 1], "position": [0, 1, 2]}, "names 2 layers, 3 positions. Give one of each, or lists of one length"),
        ({"position": []}, "names no entries: nothing would be edited"),
    ],
)
def test_what_names_no_entries_is_refused(named: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=re.escape(said)):
        jm.edits.zero("neuron", **named)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            np.zeros(24),
            "values of shape [24] for 1 entry: the first axis is [E = 1]. For one value of the whole unit axis, write values[None]",
        ),
        (np.zeros((2, 24)), "values of shape [2, 24] for 1 entry"),
        ("x", "is 'x'; numbers are expected"),
        ([[1], [2, 3]], "numbers are expected"),
        (np.zeros(1, complex), "numbers are expected"),
    ],
)
def test_values_that_do_not_go_with_the_entries_are_refused(values: Any, said: str) -> None:
    with pytest.raises(jm.UserError, match=re.escape(said)):
        jm.edits.resample("neuron", values, layer=0)


@pytest.mark.parametrize(("given", "said"), [([1, 2], "shape [2]; one number"), ("much", "is 'much'; numbers"), (None, "None; numbers")])
def test_a_coefficient_that_is_not_one_number_is_refused(given: Any, said: str) -> None:
    with pytest.raises(jm.UserError, match=re.escape(said)):
        jm.edits.steer("residual_out", np.ones(16), given)


@pytest.mark.parametrize("direction", [np.zeros(16), np.eye(16), ["a"], np.full(16, np.nan)])
def test_a_direction_is_a_vector_that_is_not_zero(direction: Any) -> None:
    with pytest.raises(jm.UserError, match="direction"):
        jm.edits.ablate_direction("residual_out", direction)


@pytest.mark.parametrize(
    "edits",
    [
        {"neuron": 3},
        [1],
        {"neuron": jm.Edit(1.0, None)},
        {"neuron": jm.Edit("x", 0.0)},
        {"neuron": jm.Edit(1.0, 0.0, basis=np.ones((24, 2)))},
    ],
)
def test_what_is_no_edit_is_refused(edits: Any) -> None:
    with pytest.raises(jm.UserError, match=r"Edit|edit at 'neuron' (is|has columns|holds)"):
        jm.forward(tiny.model("llama"), np.arange(3, 9), edits=edits)


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", None, {}, tiny.LLAMA])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(jm.UserError, match=r"what jm\.load returns"):
        jm.forward(model, [[3]])


def test_a_batch_without_rows_is_refused(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="holds no token"):
        jm.forward(plain_model, np.zeros((0, 3), int))


@pytest.mark.parametrize(
    ("tokens", "more", "said"),
    [
        ([[1], [1, 2]], {}, "rows of one length. Pad them"),
        (None, {}, "rows of one length. Pad them"),
        (np.zeros((1, 0), int), {}, "holds no token"),
        ([[1, 2]], {"padding": [2]}, "0 to 1"),
        ([[1, 2]], {"padding": [-1]}, "0 to 1"),
        ([[1, 2]], {"padding": [0.5]}, "0 to 1"),
    ],
)
def test_tokens_and_padding_that_cannot_be_read_are_refused(tokens: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        jm.forward(tiny.model("llama"), tokens, **more)


def test_one_text_is_refused_as_a_list_of_texts() -> None:
    model = tiny.model("llama")
    assert list(jm.forward(model, [1, 2], taps="neuron")[1]) == ["neuron"]
    for call in (lambda: jm.generate(model, "hi"), lambda: jm.tokens.batch(model, "hi"), lambda: jm.activations(model, "hi")):
        with pytest.raises(jm.UserError, match=r"write \['hi'\]"):
            call()
    with pytest.raises(jm.UserError, match=r"jm.read_pairs\(file\)"):
        jm.sweep(model, "pairs.csv")  # type: ignore[arg-type]
