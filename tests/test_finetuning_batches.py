"""What an optimiser step sees: examples, their ends, branches, rows, microbatches, epochs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

import jaxmed as jm
from jaxmed.batching.batches import choose_shape, common_beginning, epochs, fill_rows, make_batch, microbatches
from jaxmed.bench.shapes import SHAPES
from jaxmed.evaluation.refusals import is_refusal
from jaxmed.finetuning.job import make_job, response_limits
from jaxmed.finetuning.settings import Settings, make_settings
from jaxmed.models.model import Model
from jaxmed.tokens import TokenizedExample, encode_example
from tests.finetuning_sets import EXAMPLES, QUICK


def test_packing_saves_tokens_and_microbatches_split_a_step(plain_model: Model) -> None:
    packed, padded, halves = (
        make_job(plain_model, EXAMPLES, (), make_settings(**QUICK, **more)) for more in ({}, {"packing": False}, {"accumulate": 2})
    )
    begins = {tuple(one.ids[: packed.shape.trunk]) for one in packed.examples}
    assert packed.shape.trunk > 3
    assert len(begins) == 1
    assert packed.shape.length < 0.75 * padded.shape.length
    assert padded.shape.trunk == 0
    assert halves.batch(0).tokens.shape[0] == 2
    assert halves.shape.length < packed.shape.length
    for step in range(packed.steps):  # every response token of the step is scored once, however the work is cut
        scored = [Counter(job.batch(step).target[job.batch(step).weight > 0].tolist()) for job in (packed, padded, halves)]
        assert scored[0] == scored[1] == scored[2]


def test_rows_hold_every_example_once(plain_model: Model) -> None:
    lengths = [5, 9, 3, 8, 2, 2, 7]
    rows = fill_rows(lengths, 10)
    assert Counter(i for row in rows for i in row) == Counter(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    examples = [TokenizedExample(np.asarray([90, 91, *range(10 * n, 10 * n + length)]), 3) for n, length in enumerate(lengths)]
    assert common_beginning(examples) == 2
    shape = choose_shape(examples, [np.arange(7)], True, 2, plain_model.config, 2)
    batch = make_batch(examples, np.arange(7), shape, True)
    kept = batch.weight > 0
    assert kept.sum() == sum(lengths) - 7
    rows_of = np.nonzero(kept)[0]
    assert np.array_equal(batch.tokens[rows_of, batch.column[kept] + 1], batch.target[kept])
    assert np.array_equal(batch.position[rows_of, batch.column[kept]], [p for n in _order(batch) for p in range(2, n + 1)])
    own = batch.segment[:, shape.trunk :] > 0
    assert own.sum() == sum(lengths)


def test_an_epoch_has_every_example_once_in_batches_of_equal_length() -> None:
    lengths = np.random.default_rng(3).integers(20, 90, 203)
    order = epochs(lengths.tolist(), 16, 40, seed=1)
    assert [np.array_equal(one, other) for one, other in zip(order, epochs(lengths.tolist(), 16, 30, seed=1), strict=False)] == [True] * 30
    for epoch in (order[:13], order[13:26], order[26:39]):
        assert np.array_equal(np.sort(np.concatenate(epoch)), np.arange(203))
        assert {len(group) for group in epoch} <= {15, 16}
        tokens = [lengths[group].sum() for group in epoch]
        assert np.ptp(tokens) < 60  # by chance alone about two hundred
    assert not np.array_equal(order[0], order[13])
    halves = microbatches(order[0], 2)
    assert abs(int(lengths[halves[0]].sum() - lengths[halves[1]].sum())) < 60
    assert [len(group) for group in epochs([5, 5, 5], 8, 2, seed=0)] == [3, 3]


def test_a_share_of_the_examples_keeps_its_responses(plain_model: Model) -> None:
    rows = [jm.Example(f"Say {n}.", " ".join(["word"] * 9)) for n in range(10)]
    whole, cut = (make_job(plain_model, rows, settings=make_settings(**how)) for how in ({}, {"max_response": 2}))
    job = make_job(plain_model, rows, settings=Settings(max_response=2, whole_share=0.3))
    lengths = [[len(one.ids) - one.prompt for one in run.examples] for run in (whole, cut, job)]
    kept = [n for n in range(10) if lengths[2][n] > 2]
    assert len(kept) == 3
    assert lengths[2] == [lengths[0 if n in kept else 1][n] for n in range(10)]
    assert response_limits(10, job.settings) == [0 if n in kept else 2 for n in range(10)]


def test_branches_are_as_long_as_fills_them_best() -> None:
    examples = [TokenizedExample(np.arange(36), 30) for _ in range(8)]
    shape = choose_shape(examples, [np.arange(8)], True, 2, SHAPES["smollm2-135m"])
    assert (shape.branches, shape.branch) == (2, 72)  # two examples a branch without padding; four would see more keys
    examples = [TokenizedExample(np.arange(40), 30) for _ in range(8)]
    shape = choose_shape(examples, [np.arange(8)], True, 2, SHAPES["smollm2-135m"])
    assert (shape.branches, shape.branch) == (4, 40)


def _order(batch: Any) -> list[int]:
    """Lengths of the examples in the order of the batch's rows."""
    found = []
    for row in range(len(batch.tokens)):
        for branch in batch.segment[row, batch.trunk :].reshape(-1, batch.branch):
            found += [int((branch == number).sum()) for number in range(1, branch.max() + 1)]
    return found


def test_examples_end_as_the_template_ends_them(smol: Any) -> None:
    one = encode_example(smol, jm.Example("Name a colour.", "Blue."))
    assert smol.decode(one.ids[one.prompt :]) == "Blue.<|im_end|>"
    assert smol.decode(one.ids[: one.prompt]).endswith("<|im_start|>assistant\n")
    short = encode_example(smol, jm.Example("Name a colour.", "Blue is one of them."), most_response=2)
    assert (len(short.ids) - short.prompt, short.cut > 2) == (2, True)
    cut = encode_example(smol, jm.Example("Name a colour.", "Blue."), most=one.prompt + 1)
    assert (len(cut.ids), cut.cut) == (one.prompt + 1, len(one.ids) - one.prompt - 1)
    plain = encode_example(smol, jm.Example("Name a colour.", "Blue."), "plain")
    assert smol.decode(plain.ids) == "Name a colour.\nBlue."


def test_the_bundled_alignment_set_is_what_it_says() -> None:
    rows = jm.read_examples("alignment")
    harmful, benign = ([row for row in rows if row.kind == kind] for kind in ("harmful", "benign"))
    assert len(harmful) >= 160
    assert len(benign) >= 160
    splits = {row.category: {r.split for r in rows if r.category == row.category} for row in harmful}
    assert all(len(held) == 1 for held in splits.values())
    assert sum(held == {"train"} for held in splits.values()) >= 8
    assert sum(held == {"heldout"} for held in splits.values()) >= 4
    assert all(is_refusal(row.response) and len(row.response.split()) <= 30 for row in harmful)
    apologies = {row.id for row in benign if is_refusal(row.response)}
    assert len(apologies) <= 2  # a sympathetic "Sorry to hear that!", and a note of apology that was asked for
    assert all(one.startswith(("ordinary-", "polite-")) for one in apologies)
    assert len({row.response.split()[0] for row in harmful}) >= 5
    known = {pair.base for pair in jm.read_pairs("harm")}
    assert not known & {row.prompt for row in rows}
