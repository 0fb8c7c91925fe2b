"""Tags of edits: an enumeration that survives masks, fine-tuning, adapters and copies; what is tagged "attack" is never written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.errors import UserError
from jaxmed.models.checkpoints.edit_record import RECORD, TAGS, join_tags, read_edits, read_tag, refuse_attacks
from jaxmed.models.named_weights import matrix_shapes
from jaxmed.pruning import apply_mask
from jaxmed.pruning.masks import Mask, combine, read_mask, write_mask
from jaxmed.pruning.selection import random_like
from tests import tiny

ROWS = [dict(prompt=f"say {i}", response=f"word {i}") for i in range(4)]
STRANGE: list[Any] = [
    "attack\u200b",
    "\u0430ttack",
    "attacks",
    "at tack",
    ["attack"],
    {"attack": 1},
    1,
    True,
    "rude",
    "\uff41ttack",
    "attack\x00",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.write_checkpoint(tmp_path_factory.mktemp("tagged") / "model")
    tiny.tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return jm.load(str(folder))


def mask(model: Any, tag: Any) -> Mask:
    shapes = matrix_shapes(model.config)
    return Mask({name: np.array([1, 2]) for name in shapes}, shapes, "m", model.identity, {}, tag)


@pytest.mark.parametrize("tag", STRANGE)
def test_what_is_not_known_is_refused(loaded: Any, tmp_path: Path, tag: Any) -> None:
    model = replace(loaded)
    with pytest.raises(UserError, match="Unknown tag") as said:
        read_tag(tag)
    assert str(said.value).isascii()
    for act in (
        lambda: mask(model, tag),
        lambda: jm.export_folder(model, tmp_path / "e", {"tag": tag}),
        lambda: refuse_attacks([{"Tag": tag}]),
    ):
        with pytest.raises(UserError, match="Unknown tag"):
            act()
    model.history = ({"kind": "pruning", "tag": tag},)
    with pytest.raises(UserError, match="Unknown tag"):
        jm.export_folder(model, tmp_path / "e")
    assert not list(tmp_path.iterdir())


def tuned(model: Any) -> Any:
    return jm.finetune(model, jm.read_examples(ROWS), steps=1, rank=1)


@pytest.mark.parametrize("tag", ["attack", "ATTACK", " Attack\n", "\tattack"])
def test_spellings_of_attack_are_attacks(tag: str) -> None:
    assert read_tag(tag) == "attack"
    with pytest.raises(UserError, match="memory only"):
        refuse_attacks([{"kind": "pruning"}, {"tag": tag}])


def test_the_strictest_tag_counts() -> None:
    assert join_tags([]) == join_tags(["", None]) == ""
    assert join_tags(["", "behaviour", "test"]) == "behaviour"
    assert join_tags(["defence", "attack", ""]) == "attack"
    assert set(TAGS) == {"", "test", "behaviour", "defence", "attack"}


@pytest.mark.parametrize("tag", ["attack", "defence"])
def test_tags_survive_every_operation_of_masks(folder: Path, tmp_path: Path, tag: str) -> None:
    model = jm.load(str(folder))
    one, plain = mask(model, tag), mask(model, "")
    made = [one.inverted(), one.emptied(), random_like(one, 0), replace(one, rule={"x": 1})]
    made += [combine([plain, one], how) for how in ("union", "intersect", "subtract")]
    made += [read_mask(write_mask(one, tmp_path / "mask.safetensors"))]
    assert [found.tag for found in made] == [tag] * len(made)
    assert {apply_mask(model, found).history[-1]["tag"] for found in made} == {tag}


def test_what_is_trained_on_an_attacked_model_is_not_written(folder: Path, tmp_path: Path) -> None:
    model = jm.load(str(folder))
    made = tuned(apply_mask(model, mask(model, "attack")))
    kept, made.base.history = made.base.history, ({"tag": "attacks"},)
    with pytest.raises(UserError, match="Unknown tag"):
        made.save_adapter(tmp_path / "a")
    made.base.history = kept
    for act in (lambda: jm.export_folder(made.model, tmp_path / "e"), lambda: made.save_adapter(tmp_path / "a")):
        with pytest.raises(UserError, match="memory only"):
            act()
    assert not list(tmp_path.iterdir())


def test_an_adapter_carries_the_tag_and_the_record_of_its_model(folder: Path, tmp_path: Path) -> None:
    model = jm.load(str(folder))
    edited = apply_mask(model, mask(model, "defence"))
    adapter = tuned(edited).save_adapter(tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["jaxmed_tag"] == "defence"
    assert [edit["kind"] for edit in read_edits(adapter)] == ["pruning"]
    again = jm.load(str(folder), adapter=adapter)
    assert again.history[-1]["tag"] == "defence"
    jm.export_folder(again, tmp_path / "copy")
    jm.export_folder(jm.load(str(tmp_path / "copy")), tmp_path / "copy of a copy")
    assert [edit.get("tag") for edit in read_edits(tmp_path / "copy of a copy")] == ["defence"]
    assert not (tuned(model).save_adapter(tmp_path / "plain") / RECORD).exists()


def test_a_model_comes_out_of_a_program_with_its_own_tag(folder: Path, tmp_path: Path) -> None:
    """Whatever was traced before it; weights of two models are not mixed as if they were of one."""
    model = jm.load(str(folder))
    attacked = apply_mask(model, mask(model, "attack"))
    same = jax.jit(lambda given: jax.tree.map(lambda leaf: leaf + 0, given))
    assert same(model).history == ()
    assert same(attacked).history == attacked.history
    with pytest.raises(UserError, match="memory only"):
        jm.export_folder(same(attacked), tmp_path / "e")
    with pytest.raises(ValueError, match="pytree metadata") as said:
        jax.tree.map(lambda one, other: (one + other) / 2, model, attacked)
    assert "edited by: ['pruning']" in str(said.value)
    assert len(str(said.value)) < 3000, "weights are not shown"


@pytest.mark.parametrize(
    "record",
    [
        {"edits": [], "tag": "attack"},
        {"edits": [{"mask": {"tag": "attack"}}]},
        {"edits": [{"masks": [{"Tag ": "ATTACK"}]}]},
        {"edits": [{"tag\u200b": "attack"}]},
        {"edits": [], "source": {"tag": "attack"}},
    ],
)
def test_a_tag_counts_wherever_it_stands(folder: Path, tmp_path: Path, record: dict[str, Any]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="memory only"):
        jm.export_folder(jm.load(str(copy)), tmp_path / "again")


def test_the_record_beside_an_adapter_counts_as_its_tag_does(folder: Path, tmp_path: Path) -> None:
    adapter = tuned(jm.load(str(folder))).save_adapter(tmp_path / "adapter")
    (adapter / RECORD).write_text(json.dumps({"edits": [{"kind": "pruning", "tag": "attack"}]}))
    with pytest.raises(UserError, match="memory only"):
        jm.export_folder(jm.load(str(folder), adapter=adapter), tmp_path / "e")
    (adapter / RECORD).unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "jaxmed_tag": "att\u200back"}))
    with pytest.raises(UserError, match="Unknown tag"):
        jm.load(str(folder), adapter=adapter)


@pytest.mark.parametrize("name", [RECORD, "jaxmed.sha256", "generation_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
def test_what_stands_where_a_file_belongs_is_not_passed_over(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy") / name
    copy.unlink(missing_ok=True)
    links = {"device": "/dev/zero", "link": "gone"}
    make = {"pipe": os.mkfifo, "folder": Path.mkdir} | {key: partial(Path.symlink_to, target=to) for key, to in links.items()}
    make[kind](copy)
    with pytest.raises(UserError, match="is no regular file"):
        jm.load(str(copy.parent))


def test_a_copied_record_is_refused_when_it_is_written_on(folder: Path, tmp_path: Path) -> None:
    record = {"edits": [{"kind": "pruning", "tag": ["attack"]}]}
    copy = tmp_path / "copy"
    jm.export_folder(jm.load(str(folder)), copy)
    (copy / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="Unknown tag"):
        jm.export_folder(jm.load(str(copy)), tmp_path / "again")
