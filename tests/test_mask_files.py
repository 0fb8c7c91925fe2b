"""Mask files that are not what they say, and unions that would hide where their parts come from."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.models.model import Model
from jaxmed.models.named_weights import matrix_shapes, named_weights, weights_by_name
from jaxmed.pruning import apply_mask, combine, read_mask, write_mask
from jaxmed.pruning.masks import HOW, Mask
from jaxmed.pruning.overlaps import STRATA, _strata

SHAPES = {"model.layers.0.mlp.up_proj.weight": [24, 16], "model.layers.0.mlp.down_proj.weight": [16, 24]}


def write(file: Path, dtype: Any = np.int64, **metadata: Any) -> Path:
    """A mask file with some metadata changed; None takes an entry out."""
    said = {"format": "jaxmed-mask-1", "model": "m", "weights": "w", "tag": "", "shapes": json.dumps(SHAPES), "rule": "{}", **metadata}
    arrays = {name: np.array([1, 5]).astype(dtype) for name in SHAPES}
    save_file(arrays, file, {key: value for key, value in said.items() if value is not None})
    return file


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.uint64, np.float32, np.bool_])
def test_indices_of_other_types_are_refused(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(jm.UserError, match="not a vector of int64"):
        read_mask(write(tmp_path / "mask.safetensors", dtype))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"format": "jaxmed-mask-2"}, "reads 'jaxmed-mask-1'"),
        ({"format": "pt"}, "format 'pt'"),
        ({"format": None}, "have no 'format'"),
        ({"rule": None}, "have no 'rule'"),
        ({"tag": None, "sha256": "0" * 64}, "have no 'tag'"),
        ({"rule": "[]"}, r"rule is \[\]"),
        ({"rule": '"q"'}, "rule is 'q'"),
        ({"rule": "null"}, "rule is None"),
        ({"rule": "3"}, "rule is 3"),
        ({"rule": "{"}, "no readable mask"),
        ({"rule": "[" * 100_000}, "no readable mask"),
        ({"shapes": "[]"}, "shapes are"),
        ({"shapes": '{"a": 3}'}, "shapes are"),
        ({"shapes": '{"a": ["3"]}'}, "shapes are"),
        ({"shapes": '{"a": [true, -1]}'}, "shapes are"),
    ],
)
def test_metadata_that_are_no_mask_s_are_refused(tmp_path: Path, metadata: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        read_mask(write(tmp_path / "mask.safetensors", **metadata))


def mask_of(model: Model, weights: str, *at: int) -> Mask:
    """The same weights of every matrix, made of a model of some identity."""
    shapes = matrix_shapes(model.config)
    return Mask({name: np.array(at) for name in shapes}, shapes, f"model {weights[:1]}", weights)


@pytest.mark.parametrize("how", ["union", "intersect", "subtract"])
def test_masks_of_different_weights_are_combined_only_where_that_is_meant(plain_model: Model, tmp_path: Path, how: str) -> None:
    mine, other = mask_of(plain_model, plain_model.identity, 1, 2), mask_of(plain_model, "f" * 64, 2)
    with pytest.raises(jm.UserError, match="different weights"):
        combine([mine, other], how)
    both = combine([mine, other], how, any_model=True)
    with pytest.raises(jm.UserError, match="other weights"):
        apply_mask(plain_model, both)
    assert apply_mask(plain_model, both, any_model=True).history[-1]["weights"] == both.count
    assert apply_mask(plain_model, combine([mine, mask_of(plain_model, plain_model.identity, 2)], how)).history
    files = [str(write_mask(mask, tmp_path / f"{number}.safetensors")) for number, mask in enumerate((mine, other))]
    asked = ["prune", "combine", *files, "--how", how, "--out", str(tmp_path / "both.safetensors")]
    assert main(asked) == 2
    assert main([*asked, "--any-model"]) == 0
    assert read_mask(tmp_path / "both.safetensors").weights == both.weights


def test_an_inverted_mask_is_all_other_weights(plain_model: Model) -> None:
    mask = mask_of(plain_model, plain_model.identity, 0, 3)
    rest = mask.inverted()
    assert rest.count == mask.size - mask.count
    for name, found in rest.indices.items():
        assert found.dtype == np.int64
        assert np.array_equal(found, np.setdiff1d(np.arange(np.prod(mask.shapes[name])), mask.indices[name]))


SIDE, MATRICES = 256, 40
ONE = 8 * SIDE**2
"""Bytes of the indices of a whole matrix; those of all are 40 times as many."""


def many(seed: int) -> Mask:
    """A hundredth of the weights of 40 matrices."""
    rng = np.random.default_rng(seed)
    shapes = {f"model.layers.{number}.mlp.up_proj.weight": (SIDE, SIDE) for number in range(MATRICES)}
    return Mask({name: np.sort(rng.choice(SIDE**2, SIDE**2 // 100, replace=False)) for name in shapes}, shapes, "m", "w")


@pytest.mark.parametrize("how", ["invert", *HOW])
def test_inverted_masks_are_written_and_combined_matrix_by_matrix(tmp_path: Path, how: str) -> None:
    one, other = many(0), many(1)
    tracemalloc.start()
    made = one.inverted() if how == "invert" else combine([one.inverted(), other.inverted()], how)
    write_mask(made, tmp_path / "made.safetensors")
    assert made.emptied().count == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MATRICES / 4 * ONE
    rest = [{name: np.setdiff1d(np.arange(SIDE**2), mask.indices[name]) for name in mask.indices} for mask in (one, other)]
    join: Any = {"invert": lambda a, b: a, "intersect": np.intersect1d, "union": np.union1d, "subtract": np.setdiff1d}[how]
    written = read_mask(tmp_path / "made.safetensors")
    for name, found in written.indices.items():
        assert np.array_equal(found, join(rest[0][name], rest[1][name]))
    assert made.counts() == written.counts()
    assert made.digest == written.digest


def test_matrices_that_a_made_mask_lacks_are_not_made() -> None:
    with pytest.raises(KeyError):
        many(0).inverted().indices["no matrix"]
    assert "no matrix" not in many(0).inverted().indices


def test_weights_by_name_are_those_of_all_layers(plain_model: Model) -> None:
    lazy, all_held = weights_by_name(plain_model), dict(named_weights(plain_model))
    assert list(lazy) == list(all_held)
    for name in reversed(all_held):
        assert np.array_equal(lazy[name], all_held[name])


@pytest.mark.parametrize("size", [7, 20, 1001])
def test_strata_are_equal_parts_by_rank(size: int) -> None:
    values = np.random.default_rng(size).integers(0, 50, size).astype(np.float32)
    sizes, stratum = _strata(values)
    rank = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    assert np.array_equal(stratum, rank * STRATA // size)
    assert np.array_equal(sizes, np.bincount(stratum, minlength=STRATA))
