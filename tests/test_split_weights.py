"""What every device reads of a checkpoint and holds of a model on a mesh, and meshes that are refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.axes import partition, row_parts, vocabulary_parts
from jaxmed.cli.main import main
from jaxmed.distributed import AXES
from jaxmed.models.checkpoints.assemble import WHOLE, _build
from jaxmed.models.checkpoints.huggingface import open_folder
from jaxmed.models.checkpoints.tensors import is_stacked, letters_of, needed_rules
from jaxmed.models.families import read_config
from jaxmed.models.params import param_letters, param_shapes
from tests import reference, tiny

FSDP, TENSOR, BOTH = ("fsdp",), ("tensor",), ("tensor", "fsdp")


def abstract(data: int, fsdp: int, tensor: int) -> Any:
    """A mesh of devices that are not there."""
    return jax.sharding.AbstractMesh((data, fsdp, tensor), AXES)


def cuts(letters: str, shape: tuple[int, ...]) -> list[tuple[Any, tuple[slice, ...]]]:
    """The parts of a parameter on two by two devices, and where they lie in it."""
    spec = partition(letters, shape, abstract(1, 2, 2)).spec
    axes = [() if one is None else (one,) if isinstance(one, str) else one for one in spec]
    ways = [range(2 ** len(own)) for own in axes]
    found = []
    for numbers in itertools.product(*ways):
        part = tuple((own, number, 2 ** len(own)) for own, number in zip(axes, numbers, strict=True) if own)
        sizes = [size // 2 ** len(own) for size, own in zip(shape, axes, strict=True)]
        found.append((part, tuple(slice(n * size, (n + 1) * size) for n, size in zip(numbers, sizes, strict=True))))
    return found


@pytest.mark.parametrize("name", ["llama3.2", "gpt2", "phi3", "qwen3-moe"])
def test_devices_read_two_dimensional_slices_and_no_number_twice(name: str, tmp_path: Path) -> None:
    """Apart, fused and transposed matrices, and experts."""
    reference.save(name, tmp_path)
    checkpoint, numbers = open_folder(tmp_path), []
    family, config = read_config(checkpoint.config)
    counted = replace(checkpoint, read=lambda name, cut=None: numbers.append((one := checkpoint.read(name, cut)).size) or one)
    split = 0
    for rule in needed_rules(family, config):
        letters = (letters_of(rule, config) or "").removeprefix("L") if is_stacked(rule) else letters_of(rule, config) or ""
        whole = _build(checkpoint, rule, config, 0, WHOLE, [])
        for part, place in cuts(letters, whole.shape):
            numbers.clear()
            assert np.array_equal(_build(counted, rule, config, 0, part, []), whole[place]), (letters, part)
            assert sum(numbers) == whole[place].size
            split += len(part) == 2
    assert split >= 16  # four matrices, in four parts


def test_matrices_are_split_over_both_axes_vectors_and_scales_of_the_width_are_whole() -> None:
    config = replace(tiny.CONFIGS["mixture"], int8=True, tied=True, out_bias=True)
    mesh = abstract(2, 2, 2)
    letters, shapes = param_letters(config), param_shapes(config)
    specs = jax.tree.map(lambda held, shape: tuple(partition(held, shape.shape, mesh).spec), letters, shapes)
    held = {name: {axis for axis in spec if axis} for name, spec in specs["blocks"].items()}
    assert all(held[name] == {"fsdp", "tensor"} for name in ("qkv", "out", "gate_up", "down", "router"))
    assert not held["attention_norm"] | held["out_scale"] | held["down_scale"] | held["out_bias"]
    assert held["qkv_scale"] == held["gate_up_scale"] == {"tensor"}
    assert specs["embedding"] == (("tensor", "fsdp"), None)


def test_devices_of_fsdp_hold_a_part_of_every_matrix() -> None:
    model = tiny.model("llama", mesh="fsdp=2")
    assert (row_parts(model.mesh), vocabulary_parts(model.mesh)) == (2, 2)
    for path, leaf in jax.tree.leaves_with_path(model.params):
        part = math.prod(leaf.addressable_shards[0].data.shape)
        assert part * (1 if "norm" in jax.tree_util.keystr(path) else 2) == leaf.size, path


def test_a_config_knows_the_mesh_only_where_layers_are_gathered_and_identity_does_not() -> None:
    alone, split = (tiny.model("llama", mesh=mesh) for mesh in ("data=1", "fsdp=2"))
    assert alone.config.mesh is None
    assert split.config.mesh == split.mesh
    assert alone.identity == split.identity


def test_texts_are_written_alike_where_layers_are_gathered() -> None:
    found = [jm.generate(tiny.model("llama", mesh=mesh), ["how to", "a b c", "why"], max_tokens=6) for mesh in ("data=1", "fsdp=2")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("model=2", "the axis 'model' is called 'tensor' now. Write tensor=2."),
        ("pipe=2", "Legal axes: data, fsdp, tensor. Example: data=4,fsdp=2,tensor=2."),
        ("data=0", "'data=0' is not AXIS=SIZE"),
        ("data=2,data=1", "gives 'data' twice"),
        ("fsdp=4,tensor=16", "needs 64 devices; there are 2"),
    ],
)
def test_meshes_that_make_no_sense_are_refused(mesh: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "m")
    assert main(["sweep", "--model", str(folder), "--mesh", mesh, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("tensor=2", "tensor=2 does not divide this model's key/value heads (3), query heads (3). Sizes of 'tensor' that divide it: 1, 3."),
        ("fsdp=2", "fsdp=2 does not divide this model's vocabulary (265). Sizes of 'fsdp' that divide it: 1, 5."),
    ],
)
def test_sizes_that_do_not_divide_are_said_before_weights_are_read(
    mesh: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"num_attention_heads": 3, "num_key_value_heads": 3} if "tensor" in mesh else {"vocab_size": 265, "hidden_size": 20}
    folder = tiny.write_checkpoint(tmp_path / "m", **changes)
    assert main(["sweep", "--model", str(folder), "--mesh", mesh, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_a_mesh_of_other_axes_is_refused(tmp_path: Path) -> None:
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    with pytest.raises(jm.UserError, match="needed are data, fsdp, tensor"):
        jm.load(str(tiny.write_checkpoint(tmp_path / "m")), mesh=mesh)
