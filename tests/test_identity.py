"""The identity of a model: equal where the weights are, different after every edit, cheap for files that were read before."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.models import digests
from jaxmed.models.digests import known_digest
from jaxmed.models.load import describe
from jaxmed.models.model import Model
from jaxmed.models.named_weights import matrix_shapes
from jaxmed.pruning import apply_mask
from jaxmed.pruning.masks import Mask
from tests import tiny

EXAMPLES = jm.read_examples([{"prompt": f"say {number}", "response": f"word {number}"} for number in range(4)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama on disk, with a tokenizer."""
    made = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(made)
    return made


def mask_of(model: Model, *at: int) -> Mask:
    """The weights at the same indices of every matrix."""
    shapes = matrix_shapes(model.config)
    return Mask({name: np.array(at) for name in shapes}, shapes, model.name, model.identity)


def edited(model: Model) -> dict[str, Model]:
    """A model and its relatives, no two of which compute the same."""
    blocks = model.params["blocks"]
    return {
        "as it is": model,
        "masked": apply_mask(model, mask_of(model, 1, 2)),
        "masked elsewhere": apply_mask(model, mask_of(model, 1, 3)),
        "masked to the mean": apply_mask(model, mask_of(model, 1, 2), "mean"),
        "masked twice": apply_mask(apply_mask(model, mask_of(model, 1, 2)), mask_of(model, 5), any_model=True),
        "fine-tuned": jm.finetune(model, EXAMPLES, steps=1, rank=1).model,
        "fine-tuned longer": jm.finetune(model, EXAMPLES, steps=2, rank=1).model,
        "changed by hand": replace(model, params={**model.params, "blocks": {**blocks, "down": blocks["down"] * 2}}),
    }


@pytest.mark.parametrize("of", ["a folder", "arrays in memory"])
def test_every_edit_makes_another_identity(folder: Path, plain_model: Model, of: str) -> None:
    model = jm.load(str(folder)) if of == "a folder" else replace(plain_model, tokenizer=tiny.tokenizer())
    found = {name: one.identity for name, one in edited(model).items()}
    assert len(set(found.values())) == len(found), found
    assert all(len(one) == 64 for one in found.values())


def test_parameters_changed_in_place_are_noticed(plain_model: Model) -> None:
    model = replace(plain_model, params={**plain_model.params})
    before = model.identity
    model.params["final_norm"] = model.params["final_norm"] + 1
    assert model.identity != before
    model.params["final_norm"] = model.params["final_norm"] - 1
    assert np.allclose(model.params["final_norm"], plain_model.params["final_norm"])


def test_the_same_weights_have_one_identity(folder: Path, tmp_path: Path) -> None:
    one = jm.load(str(folder))
    first = one.identity
    elsewhere = folder.rename(tmp_path / "under another name")
    (elsewhere / "config.json").write_text(json.dumps({**json.loads((elsewhere / "config.json").read_text()), "use_cache": True}))
    assert jm.load(str(elsewhere), dtype="bfloat16").identity == first
    assert describe(str(elsewhere)).identity == first
    assert one.identity != first  # its files are gone, so what it holds is hashed
    made = {"blocks": {"down": jnp.ones((2, 3, 4))}}
    assert Model(one.config, made, None, one.mesh, "a").identity == Model(one.config, {**made}, None, one.mesh, "b").identity


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-3}, {"max_position_embeddings": 256}])
def test_the_config_is_part_of_the_identity(folder: Path, change: dict[str, Any]) -> None:
    before = jm.load(str(folder)).identity
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    assert jm.load(str(folder)).identity != before


def test_int8_is_part_of_the_identity(folder: Path) -> None:
    assert jm.load(str(folder)).identity != jm.load(str(folder), int8=True).identity


def test_masks_and_scores_of_a_relative_are_refused(folder: Path, tmp_path: Path) -> None:
    model = jm.load(str(folder))
    for name, other in edited(model).items():
        if other is not model:
            with pytest.raises(jm.UserError, match="other weights"):
                apply_mask(model, mask_of(other, 1))
            assert apply_mask(model, mask_of(other, 1), any_model=True).history[-1]["kind"] == "pruning", name
    tuned = jm.finetune(model, EXAMPLES, steps=1, rank=1).model
    jm.pruning.score(tuned, EXAMPLES, kinds=("behaviour_signed",), out=tmp_path / "scores")
    with pytest.raises(jm.UserError):
        jm.pruning.score(model, EXAMPLES, kinds=("behaviour_signed",), out=tmp_path / "scores", resume=True)


def test_a_digest_is_taken_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    read: list[Path] = []
    monkeypatch.setattr(digests, "digest", lambda file: (read.append(file), hashlib.sha256(file.read_bytes()).hexdigest())[1])
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = known_digest(file)
    assert (known_digest(file), len(read)) == (first, 1)
    stamp = file.stat()
    file.write_bytes(b"two")  # as long, and with the old time put back
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (known_digest(file), len(read)) == (hashlib.sha256(b"two").hexdigest(), 2)
    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text("[]")
    assert (known_digest(file), len(read)) == (hashlib.sha256(b"two").hexdigest(), 3)
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    first = hashlib.sha256(b"two").hexdigest()
    note.write_text(note.read_text().replace(first, ("1" if first[0] == "0" else "0") + first[1:]))
    assert (known_digest(file), len(read)) == (first, 4)


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"one")
    known_digest(tmp_path / "weights")
    assert not (tmp_path / "cache").exists()


def test_blobs_of_the_hub_are_not_read(tmp_path: Path) -> None:
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"content whose digest is another")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert known_digest(tmp_path / "model.safetensors") == name
    (tmp_path / "blobs" / ("c" * 40)).write_bytes(b"small files are named by Git's digest")
    (tmp_path / "config.json").symlink_to(tmp_path / "blobs" / ("c" * 40))
    assert known_digest(tmp_path / "config.json") == hashlib.sha256(b"small files are named by Git's digest").hexdigest()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    (tmp_path / "weights").write_bytes(b"one")
    assert known_digest(tmp_path / "weights") == hashlib.sha256(b"one").hexdigest()
