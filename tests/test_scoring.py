"""Log-probabilities of given responses, packed, against forward passes of one example after the other."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.scoring import _score, choice_logits, passes, score_responses
from jaxmed.models.vocabulary import largest, log_total
from jaxmed.tokens import TokenizedExample
from tests import tiny


def _examples(rng: np.random.Generator, lengths: list[int], beginning: int) -> list[TokenizedExample]:
    opening = rng.integers(0, 200, beginning)
    found = []
    for length in lengths:
        prompt = int(rng.integers(beginning + 1, length)) if beginning + 1 < length else beginning + 1
        own = rng.integers(0, 200, max(length, prompt + 1) - beginning)
        found.append(TokenizedExample(np.concatenate([opening, own]).astype(np.int32), prompt))
    return found


def _own(model: jm.Model, example: TokenizedExample) -> np.ndarray:
    """Log-probabilities of the response by a forward pass of the example alone."""
    logits = np.asarray(jm.forward(model, example.ids[None])[0][0], np.float64)[example.prompt - 1 : -1]
    response = example.ids[example.prompt :]
    return logits[np.arange(len(response)), response] - np.logaddexp.reduce(logits, axis=1)


def _rounding(model: jm.Model, example: TokenizedExample) -> np.ndarray:
    """How far the smallest change of every weight, up or down at random, moves each of these; the largest of eight draws."""
    moved = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        ends = np.asarray([-np.inf, np.inf], np.float32)
        params = jax.tree.map(lambda x, rng=rng, ends=ends: np.nextafter(np.asarray(x), rng.choice(ends, x.shape)), model.params)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, model.params)
        moved.append(np.abs(_own(replace(model, params=placed), example) - _own(model, example)))
    return np.max(moved, axis=0)


@pytest.mark.parametrize(
    ("mesh", "beginning"),
    [("data=2", 19), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("data=1", 0), ("tensor=2", 10), ("fsdp=2", 10)))],
)
def test_packed_examples_score_as_alone(mesh: str, beginning: int) -> None:
    model, rng = tiny.model("llama", mesh=mesh), np.random.default_rng(beginning)
    examples = _examples(rng, [25, 2, 140, 31, 300, 60, 22, 45, 333, 28, 90], beginning)
    seen: list[int] = []
    found = score_responses(model, examples, seen.append)
    assert sum(seen) == len(examples)
    for example, scored in zip(examples, found, strict=True):
        logits = np.asarray(jm.forward(model, example.ids[None])[0][0], np.float64)[example.prompt - 1 : -1]
        response = example.ids[example.prompt :]
        apart = np.abs(scored.log_probabilities - _own(model, example))
        if apart.max() >= 3e-5:  # a token whose value one rounding of the weights moves as far
            apart -= _rounding(model, example)
        assert apart.max() < 3e-5
        assert np.array_equal(scored.likeliest, logits.argmax(1) == response)
    picked = choice_logits(model, [one.ids[: one.prompt] for one in examples], [7, 90, 33])
    for example, values in zip(examples, picked, strict=True):
        logits = np.asarray(jm.forward(model, example.ids[None])[0][0])[example.prompt - 1]
        assert np.abs(values - logits[[7, 90, 33]]).max() < 3e-5


@pytest.mark.parametrize("mesh", ["data=2", pytest.param("data=1", marks=pytest.mark.slow)])
def test_responses_to_one_prompt_score_as_alone_and_run_it_once(mesh: str) -> None:
    model, rng = tiny.model("llama", mesh=mesh), np.random.default_rng(3)
    examples = []
    for number in range(12):
        prompt = rng.integers(0, 200, 30 + number)
        examples += [TokenizedExample(np.append(prompt, rng.integers(0, 200, n)).astype(np.int32), len(prompt)) for n in (1, 6, 3, 0, 9)]
    examples.append(TokenizedExample(np.append(examples[0].ids[:30], rng.integers(0, 200, 400)).astype(np.int32), 30))  # a class of its own
    order = rng.permutation(len(examples))
    mixed = [examples[i] for i in order]
    for example, scored in zip(mixed, score_responses(model, mixed), strict=True):
        logits = np.asarray(jm.forward(model, example.ids[None])[0][0], np.float64)[example.prompt - 1 : -1]
        response = example.ids[example.prompt :]
        own = logits[np.arange(len(response)), response] - np.logaddexp.reduce(logits, axis=1)
        assert np.abs(scored.log_probabilities - own).max(initial=0.0) < 3e-5
        assert np.array_equal(scored.likeliest, logits.argmax(1) == response)
    short = examples[:-1]
    run = sum(batch.tokens.size for _, batch in passes(model, short))
    once = sum(len(examples[number].ids) + 18 for number in range(0, 60, 5))
    assert run < 1.25 * once < 0.5 * sum(len(one.ids) for one in short)


def test_fewer_examples_than_devices() -> None:
    model, examples = tiny.model("llama", mesh="data=2"), _examples(np.random.default_rng(0), [12], 0)
    (scored,) = score_responses(model, examples)
    assert len(scored.log_probabilities) == len(examples[0].ids) - examples[0].prompt
    assert score_responses(model, []) == []
    (nothing,) = score_responses(model, [TokenizedExample(np.arange(5, dtype=np.int32), 5)])
    assert len(nothing.log_probabilities) == 0


def test_a_common_beginning_runs_once_and_alike_passes_share_a_program(plain_model: jm.Model) -> None:
    rng = np.random.default_rng(0)
    examples = _examples(rng, [int(n) for n in rng.integers(40, 60, 400)], 24)
    before = _score._cache_size()  # type: ignore[attr-defined]
    seen: list[int] = []
    score_responses(plain_model, examples, seen.append)
    assert _score._cache_size() == before + 1  # type: ignore[attr-defined]
    own = sum(len(one.ids) - 24 for one in examples)
    assert len(seen) == -(-own // (2 * (2048 - 24)))


@pytest.mark.parametrize("size", [256, 264, 5])
def test_sums_over_the_vocabulary(size: int) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 30, (3, 4, size)), jnp.float32)
    assert np.allclose(log_total(logits), jax.nn.logsumexp(logits, -1), rtol=1e-6)
    assert np.array_equal(largest(logits), logits.max(-1))
    odd = logits.at[0].set(-jnp.inf).at[1, 0, 2].set(jnp.inf).at[1, 1, ::2].set(-jnp.inf)
    assert np.allclose(log_total(odd), jax.nn.logsumexp(odd, -1), rtol=1e-6)
    ours, theirs = (jax.grad(lambda x, f=f: (f(x) ** 2).sum())(logits) for f in (log_total, lambda x: jax.nn.logsumexp(x, -1)))
    assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
