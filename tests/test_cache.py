"""Activations at words of prompts, and folders of activations: written batch by batch, continued, refused, mended."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import xarray as xr

import jaxmed as jm
from jaxmed.cache import job, run
from jaxmed.cache.folders import read_held, verify
from jaxmed.files.arrays import open_array
from jaxmed.models.model import Model

PROMPTS = [
    "how to harm",
    "a harm",
    "why is it very bad to harm so, and what else is there to be said about it, if anything at all?",
    "harm b",
]
SITES = ("residual_out", "hook_z")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward call; batches and shards hold two prompts."""
    made, forward = [], run.forward

    def counted(model: Model, ids: np.ndarray, **more: Any) -> Any:
        made.append(len(ids))
        return forward(model, ids, **more)

    monkeypatch.setattr(run, "forward", counted)
    monkeypatch.setattr(run, "ROWS", 2)
    monkeypatch.setattr(job, "prompts_of_a_shard", lambda each, count: 2)
    return made


@pytest.mark.parametrize("word", ["harm", "user", "user_last", "header"])
def test_words_are_the_tokens_that_they_cover(plain_model: Model, word: str) -> None:
    table, whole = jm.activations(plain_model, PROMPTS, SITES, word), jm.activations(plain_model, PROMPTS, SITES, "all")
    for number, prompt in enumerate(PROMPTS):
        rendered = jm.tokens.render(plain_model, prompt)
        at = np.asarray(jm.tokens.locate(rendered, word)) - len(rendered.ids)
        assert table.token_position.values[number].tolist() == [*[0] * (table.sizes["position"] - len(at)), *at]
        for site in SITES:
            found = table[site].values[number]
            np.testing.assert_array_equal(found[:, -len(at) :], whole[site].sel(position=at).values[number])
            assert np.isnan(found[:, : -len(at)]).all()


def test_a_direction_may_be_read_at_a_word(plain_model: Model) -> None:
    found = jm.mean_difference(plain_model, PROMPTS, PROMPTS[:2], "residual_mid", "user_last")
    values = jm.activations(plain_model, PROMPTS, "residual_mid", "user_last").residual_mid.values[:, :, 0]
    np.testing.assert_allclose(found, values.mean(0) - values[:2].mean(0), atol=1e-6)


def test_each_is_every_token(plain_model: Model) -> None:
    xr.testing.assert_identical(
        jm.activations(plain_model, PROMPTS, positions="each"), jm.activations(plain_model, PROMPTS, positions="all")
    )


@pytest.mark.parametrize("positions", ["last", "all", [-1, -30], "harm"])
def test_a_folder_holds_what_memory_would(plain_model: Model, positions: Any, tmp_path: Path) -> None:
    sites = (*SITES, "attention_pattern")
    examples = [jm.Example(prompt, id=f"prompt {number}") for number, prompt in enumerate(PROMPTS)]
    stored = jm.activations(plain_model, examples, sites, positions, out=tmp_path / "a")
    xr.testing.assert_identical(stored.load(), jm.activations(plain_model, examples, sites, positions))


def test_the_result_is_read_as_it_is_needed(plain_model: Model, tmp_path: Path) -> None:
    stored = jm.activations(plain_model, PROMPTS, out=tmp_path / "a")
    assert not stored.residual_out.variable._in_memory


def test_any_reader_of_zarr_opens_a_folder_and_its_manifest_says_what_it_is_of(plain_model: Model, tmp_path: Path) -> None:
    stored = jm.activations(plain_model, PROMPTS, SITES, out=tmp_path / "a")
    with pytest.warns(Warning, match="not recognized as a component of a Zarr hierarchy"):
        opened = xr.open_zarr(tmp_path / "a", consolidated=False)
    xr.testing.assert_equal(opened.drop_vars("done"), stored)
    assert opened.done.values.all()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["model"]["weights"] == plain_model.identity
    assert manifest["sites"] == list(SITES)
    assert manifest["tokens"] == [jm.tokens.render(plain_model, prompt).ids.tolist() for prompt in PROMPTS]
    assert manifest["versions"]["jaxmed"] == jm.__version__


def _bytes_read() -> int:
    metric = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return int(metric[0]["values"][0]["value"]) if metric else 0


def test_a_layer_is_read_without_the_others(plain_model: Model, tmp_path: Path) -> None:
    stored = jm.activations(plain_model, PROMPTS * 16, SITES, positions="all", out=tmp_path / "a")
    size = stored.residual_out.nbytes
    array, before = open_array(tmp_path / "a" / "residual_out"), _bytes_read()
    found = array[:, 1].read().result()
    np.testing.assert_array_equal(found, stored.residual_out.values[:, 1])
    assert size / 3 <= _bytes_read() - before < size / 2  # of three layers


def test_an_interrupted_run_goes_on_where_it_was(
    plain_model: Model, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"{prompt} {number}" for number in range(2) for prompt in PROMPTS]
    wanted = jm.activations(plain_model, prompts, SITES, "all")
    every, counted = len(calls), run.forward
    calls.clear()

    def interrupted(*given: Any, **more: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(*given, **more)

    monkeypatch.setattr(run, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jm.activations(plain_model, prompts, SITES, "all", out=tmp_path / "a")
    monkeypatch.setattr(run, "forward", counted)
    with pytest.raises(jm.UserError, match="holds a run already"):
        jm.activations(plain_model, prompts, SITES, "all", out=tmp_path / "a")
    calls.clear()
    found = jm.activations(plain_model, prompts, SITES, "all", out=tmp_path / "a", resume=True)
    assert len(calls) == every - 2  # one shard was finished, and half of another
    xr.testing.assert_identical(found.load(), wanted)
    calls.clear()
    jm.activations(plain_model, prompts, SITES, "all", out=tmp_path / "a", resume=True)
    assert not calls


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": [*PROMPTS[:3], "harm c"]}, "tokens"),
        ({"sites": "mlp_out"}, "sites"),
        ({"sites": "attention_pattern"}, "sites"),
        ({"positions": -2}, "positions"),
        ({"form": "text"}, "form"),
    ],
)
def test_another_request_is_refused(plain_model: Model, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    jm.activations(plain_model, PROMPTS, out=tmp_path / "a")
    before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    with pytest.raises(jm.UserError, match=f"another request(?s:.*){said}"):
        jm.activations(plain_model, **{"prompts": PROMPTS, "out": tmp_path / "a", "resume": True, **given})
    assert before == {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_refused_and_left_alone(plain_model: Model, tmp_path: Path, calls: list[int], resume: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(jm.UserError, match="something else"):
        jm.activations(plain_model, PROMPTS, out=tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert not calls


@pytest.mark.parametrize("damage", ["lost", "changed", "swapped"])
def test_damage_is_named_and_computed_again(plain_model: Model, tmp_path: Path, calls: list[int], damage: str) -> None:
    wanted = jm.activations(plain_model, PROMPTS, out=tmp_path / "a").load()
    file, other = (tmp_path / "a" / "residual_out" / "c" / number / "0" / "0" / "0" for number in "01")
    held = bytearray(file.read_bytes())
    if damage == "swapped":
        file.write_bytes(other.read_bytes())
        other.write_bytes(held)
    else:
        held[10] ^= 255
        file.unlink() if damage == "lost" else file.write_bytes(held)
    with pytest.raises(jm.UserError, match=r"residual_out, prompts 0 to 1: (missing|damaged|holds other values)"):
        jm.activations(plain_model, PROMPTS, out=tmp_path / "a", resume=True)
    calls.clear()
    found = jm.activations(plain_model, PROMPTS, out=tmp_path / "a", resume=True)
    assert len(calls) == (4 if damage == "swapped" else 2)  # two for a shard
    xr.testing.assert_identical(found.load(), wanted)


@pytest.mark.parametrize("name", ["prompt/c/0", "position/c/0", "length/zarr.json"])
def test_damaged_labels_are_named_and_written_again(name: str, plain_model: Model, tmp_path: Path, calls: list[int]) -> None:
    wanted = jm.activations(plain_model, PROMPTS, out=tmp_path / "a").load()
    file = tmp_path / "a" / name
    file.write_bytes(file.read_bytes()[:-3])
    assert any(line.startswith(name.partition("/")[0]) for line in verify(read_held(tmp_path / "a")))
    with pytest.raises(jm.UserError, match=f"{name.partition('/')[0]}: "):
        jm.activations(plain_model, PROMPTS, out=tmp_path / "a", resume=True)
    calls.clear()
    xr.testing.assert_identical(jm.activations(plain_model, PROMPTS, out=tmp_path / "a", resume=True).load(), wanted)
    assert not calls
    assert not verify(read_held(tmp_path / "a"))


@pytest.mark.parametrize("stored", [True, False])
def test_memory_is_bounded_by_a_batch(plain_model: Model, tmp_path: Path, calls: list[int], stored: bool) -> None:
    prompts = [f"{PROMPTS[2]} {number}" for number in range(24)]
    size = jm.activations(plain_model, prompts[:2], "attention_pattern", "all", out=tmp_path / "warm").nbytes * 12
    tracemalloc.start()
    jm.activations(plain_model, prompts, "attention_pattern", "all", out=tmp_path / "a" if stored else None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2 if stored else peak > size
