"""Stored numbers that are missing, cut or changed: named, never used, computed again by --resume. Old folders without checksums open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxmed as jm
from jaxmed import results
from jaxmed.effects.stored import stored_reference
from jaxmed.errors import Notice
from jaxmed.finetuning import checkpoint
from jaxmed.models.checkpoints.orbax_store import save_store
from jaxmed.models.model import Model
from jaxmed.pruning.scores import read_scores
from jaxmed.reports.page import write_report
from jaxmed.runs.folder import read_run
from tests import tiny

SWEEP: dict[str, Any] = {"unit": ("neuron", "mlp_out"), "layers": [0, 2]}
HARMS: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": lambda file: file.write_bytes(file.read_bytes()[:7] + bytes([file.read_bytes()[7] ^ 64]) + file.read_bytes()[8:]),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
}
CHUNKS = {
    "neuron/c/1/2/0": "neuron, pair 'unequal', layer 2",
    "mlp_out/c/0/0": "mlp_out, pair 'equal', layer 0",
    "base_outcome/c/2": "base_outcome, pair 'short'",
    "base_lowest/c/1/2": "base_lowest, pair 'unequal', layer 2",
    "done/c/1/0": "done, pair 'unequal'",
    "neuron_mean/c/0/0": "neuron_mean",
}
"""Stored chunk -> how it is named."""


@pytest.fixture(scope="module")
def swept(plain_model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, xr.Dataset]:
    """A finished sweep and its table."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    return folder, jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=folder)


def _same(one: xr.Dataset, other: xr.Dataset) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f") for name in one)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_damage_is_named_and_computed_again(
    chunk: str, harm: str, swept: tuple[Path, xr.Dataset], plain_model: Model, tmp_path: Path
) -> None:
    out = shutil.copytree(swept[0], tmp_path / "run")
    HARMS[harm](out / "effects.zarr" / chunk)
    with pytest.raises(jm.UserError) as caught:
        write_report([out], tmp_path / "page.html")
    assert CHUNKS[chunk] in str(caught.value)
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(jm.UserError, match="The run was finished") as caught:
        jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True)
    assert CHUNKS[chunk] in str(caught.value)
    assert _same(jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True), swept[1])
    sessions = read_run(out)["sessions"]
    assert [session["status"] for session in sessions] == ["finished", "failed", "finished"]
    assert sessions[2]["layers"] <= 2  # no other pair was run


@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_ranked_units_that_are_damaged_are_on_no_page(
    harm: str, swept: tuple[Path, xr.Dataset], plain_model: Model, tmp_path: Path
) -> None:
    out = shutil.copytree(swept[0], tmp_path / "run")
    before = (out / "top.csv").read_bytes()
    HARMS[harm](out / "top.csv")
    with pytest.raises(jm.UserError, match=r"top\.csv (is missing|holds other bytes)"):
        write_report([out], tmp_path / "page.html")
    jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True)
    assert (out / "top.csv").read_bytes() == before
    write_report([out], tmp_path / "page.html")


def test_damage_of_a_run_that_goes_on_is_a_notice(swept: tuple[Path, xr.Dataset], plain_model: Model, tmp_path: Path) -> None:
    out = shutil.copytree(swept[0], tmp_path / "run")
    record = read_run(out)
    (out / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    HARMS["cut"](out / "effects.zarr" / "neuron/c/1/2/0")
    with pytest.warns(Notice, match="neuron, pair 'unequal', layer 2"):
        again = jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True)
    assert _same(again, swept[1])


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["pair/c/0", "group/c/0", "neuron_index/c/0", "neuron/zarr.json", "zarr.json"])
def test_what_no_run_computes_is_refused(name: str, harm: str, swept: tuple[Path, xr.Dataset], plain_model: Model, tmp_path: Path) -> None:
    out = shutil.copytree(swept[0], tmp_path / "run")
    HARMS[harm](out / "effects.zarr" / name)
    for call in (
        lambda: results.open_results(out),
        lambda: jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True),
    ):
        with pytest.raises(jm.UserError, match=r"effects\.zarr"):
            call()


def _swap(one: Path, other: Path) -> None:
    """Two files in each other's place: both whole, and their own checksums right."""
    held = one.read_bytes()
    assert held != other.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


SWAPS = {
    "layers": ("neuron/c/1/2/0", "neuron/c/1/0/0"),
    "pairs": ("mlp_out/c/0/0", "mlp_out/c/1/0"),
    "outcomes": ("base_outcome/c/0", "base_outcome/c/2"),
    "variables": ("base_lowest/c/1/2", "mlp_out/c/1/2"),
    "statistics": ("neuron_mean/c/0/0", "neuron_t/c/0/0"),
}
"""Stored chunks of equal shapes."""


@pytest.mark.parametrize("swap", SWAPS)
def test_chunks_in_each_others_place_are_named_and_computed_again(
    swap: str, swept: tuple[Path, xr.Dataset], plain_model: Model, tmp_path: Path
) -> None:
    out = shutil.copytree(swept[0], tmp_path / "run")
    one, other = (out / "effects.zarr" / name for name in SWAPS[swap])
    _swap(one, other)
    with pytest.raises(jm.UserError, match="other values than were written there") as caught:
        results.open_results(out)
    assert all(name.partition("/")[0] in str(caught.value) for name in SWAPS[swap])
    assert str(caught.value).count("\n  - ") == 2
    with pytest.raises(jm.UserError, match="The run was finished"):
        jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True)
    assert _same(jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True), swept[1])


def test_labels_in_each_others_place_are_refused(swept: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    out = shutil.copytree(swept[0], tmp_path / "run")
    _swap(out / "effects.zarr" / "category" / "c" / "0", out / "effects.zarr" / "group" / "c" / "0")
    with pytest.raises(jm.UserError, match=r"(?s)category.*group"):
        results.open_results(out)


@pytest.mark.parametrize("name", ["neuron/zarr.json", "neuron_mean/zarr.json", "zarr.json"])
def test_a_changed_letter_of_metadata_is_named(name: str, swept: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    out = shutil.copytree(swept[0], tmp_path / "run")
    file = out / "effects.zarr" / name
    text = file.read_text()
    at = text.index('"attributes": {') + text[text.index('"attributes": {') :].index(": ", 20) + 3
    file.write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
    with pytest.raises(jm.UserError, match=f"{name.partition('/')[0]}: its metadata is not what was written"):
        results.open_results(out)


@pytest.mark.parametrize(
    ("name", "harm"), [("neuron/c/1/0/0", "a flipped bit"), ("neuron/zarr.json", "cut"), ("base_outcome/c/1", "missing")]
)
def test_damaged_checksums_pass_nothing_and_are_made_again(
    name: str, harm: str, swept: tuple[Path, xr.Dataset], plain_model: Model, tmp_path: Path
) -> None:
    out = shutil.copytree(swept[0], tmp_path / "run")
    HARMS[harm](out / "effects.zarr" / "sums" / name)
    for call in (
        lambda: results.open_results(out),
        lambda: jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True),
    ):
        with pytest.raises(jm.UserError, match=rf"{name.partition('/')[0]}.*no readable checksum"):
            call()
    assert _same(jm.sweep(plain_model, tiny.PAIRS, **SWEEP, out=out, resume=True), swept[1])
    assert _same(results.open_results(out).load(), swept[1])
    _swap(out / "effects.zarr/neuron/c/1/2/0", out / "effects.zarr/neuron/c/1/0/0")
    with pytest.raises(jm.UserError, match="other values"):
        results.open_results(out)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_of_stored_bytes_is_silent(data: st.DataObject, swept: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    out = shutil.copytree(swept[0], tmp_path / "run")
    files = sorted(path for path in (out / "effects.zarr").rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :],
                content[:at],
                content + b"\0",
                content[:at] + b"\0" + content[at:],
            ]
        )
    )
    file.write_bytes(changed)
    with pytest.raises(jm.UserError):
        results.open_results(out)


@pytest.mark.parametrize("more", [b"\0", b" "])
@pytest.mark.parametrize("array", ["", "base_outcome", "neuron", "neuron_mean"])
def test_metadata_of_checksums_is_what_was_written(array: str, more: bytes, swept: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    """Bytes behind its end are what readers of JSON may pass over."""
    out = shutil.copytree(swept[0], tmp_path / "run")
    file = out / "effects.zarr" / "sums" / array / "zarr.json"
    file.write_bytes(file.read_bytes() + more)
    with pytest.raises(jm.UserError, match="sums"):
        results.open_results(out)


def test_tables_without_checksums_open(swept: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    """As earlier versions wrote them: no checksums, chunks that equal the fill value left out."""
    out = shutil.copytree(swept[0], tmp_path / "run")
    shutil.rmtree(out / "effects.zarr" / "sums")
    for card in (out / "effects.zarr").glob("*/zarr.json"):
        held = json.loads(card.read_text())
        held["codecs"] = [codec for codec in held["codecs"] if codec["name"] != "crc32c"]
        card.write_text(json.dumps(held))
        for chunk in (card.parent / "c").rglob("*"):
            if chunk.is_file():
                chunk.write_bytes(chunk.read_bytes()[:-4])
    (out / "effects.zarr" / "neuron_q" / "c" / "0" / "0").unlink()
    table = results.open_results(out).load()
    assert np.array_equal(table.neuron, swept[1].neuron, equal_nan=True)
    HARMS["cut"](out / "effects.zarr" / "neuron/c/1/2/0")
    with pytest.raises(jm.UserError, match="neuron, pair 'unequal', layer 2"):
        results.open_results(out)


EXAMPLES = {word: jm.read_examples([{"prompt": f"say {n}", "response": f"{word} {n} ok"} for n in range(6)]) for word in ("red", "blue")}


@pytest.fixture(scope="module")
def scored(plain_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores in a folder, in three passes over each set."""
    folder = tmp_path_factory.mktemp("scored") / "scores"
    jm.pruning.score(plain_model, EXAMPLES["red"], EXAMPLES["blue"], out=folder, layers_per_pass=1)
    return folder


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", ["behaviour_signed", "preserve_absolute"])
def test_damaged_scores_choose_no_weights(kind: str, harm: str, scored: Path, plain_model: Model, tmp_path: Path) -> None:
    out, rule = shutil.copytree(scored, tmp_path / "scores"), jm.pruning.Rule(q=0.01, p=0.01)
    chunk = next(path for path in sorted((out / "scores" / kind).rglob("c/**/*")) if path.is_file() and ".1." in str(path))
    HARMS[harm](chunk)
    with pytest.raises(jm.UserError, match=f"{kind}.*layers.1"):
        jm.pruning.select(read_scores(out), rule)
    again = {"out": out, "layers_per_pass": 1, "resume": True}
    with pytest.raises(jm.UserError, match=f"{kind}.*layers.1"):
        jm.pruning.score(plain_model, EXAMPLES["red"], EXAMPLES["blue"], **again)
    mended = jm.pruning.score(plain_model, EXAMPLES["red"], EXAMPLES["blue"], **again)
    assert jm.pruning.select(mended, rule).digest == jm.pruning.select(read_scores(scored), rule).digest
    assert read_run(out)["sessions"][-1]["passes"] == 1


def test_scores_in_each_others_place_choose_no_weights(scored: Path, plain_model: Model, tmp_path: Path) -> None:
    out, rule = shutil.copytree(scored, tmp_path / "scores"), jm.pruning.Rule(q=0.01, p=0.01)
    one, other = (
        next(path for path in sorted((out / "scores" / "behaviour_signed" / name).rglob("c/**/*")) if path.is_file())
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight")
    )
    _swap(one, other)
    with pytest.raises(jm.UserError, match=r"up_proj.*other values than were written there|gate_proj.*other values"):
        jm.pruning.select(read_scores(out), rule)
    again = {"out": out, "layers_per_pass": 1, "resume": True}
    with pytest.raises(jm.UserError, match=r"(?s)up_proj.*gate_proj"):
        jm.pruning.score(plain_model, EXAMPLES["red"], EXAMPLES["blue"], **again)
    mended = jm.pruning.score(plain_model, EXAMPLES["red"], EXAMPLES["blue"], **again)
    assert jm.pruning.select(mended, rule).digest == jm.pruning.select(read_scores(scored), rule).digest


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("what", ["folder", "store", "adapter"])
def test_damaged_copies_of_weights_do_not_load(what: str, harm: str, tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "source")
    tiny.tokenizer().save_pretrained(source)
    model = jm.load(str(source), check=False)
    copy = tmp_path / "copy"
    if what == "folder":
        jm.export_folder(model, copy)
    elif what == "store":
        save_store(model, copy)
    else:
        jm.finetune(model, EXAMPLES["red"], steps=1, batch=2, rank=2).save_adapter(copy)
    load = (lambda: jm.load(str(source), adapter=copy, check=False)) if what == "adapter" else (lambda: jm.load(str(copy), check=False))
    load()
    weights = max((path for path in copy.rglob("*") if path.is_file() and "token" not in path.name), key=lambda path: path.stat().st_size)
    HARMS[harm](weights)
    with pytest.raises(jm.UserError, match=f"{weights.name}|No safetensors file"):
        load()


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_of_fine_tuning_is_not_continued(harm: str, plain_model: Model, tmp_path: Path) -> None:
    arrays = {"trained": {"a": jax.numpy.arange(4096.0)}}
    checkpoint.save(tmp_path, 3, arrays, {"arrays": ["trained"], "rows": []})
    (folder,) = checkpoint.found(tmp_path)
    HARMS[harm](max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    with pytest.raises(jm.UserError, match="to begin anew"):
        checkpoint.restore(folder, arrays)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_told(value: float, plain_model: Model, tmp_path: Path) -> None:
    down = plain_model.params["blocks"]["down"].at[1, 0, 0].set(value)
    broken = replace(plain_model, params={**plain_model.params, "blocks": {**plain_model.params["blocks"], "down": down}})
    with pytest.warns(Notice, match="not finite"):
        jm.sweep(broken, tiny.PAIRS[:1], unit="mlp_out", out=tmp_path / "run")
    assert read_run(tmp_path / "run")["not_finite"]["mlp_out"] > 0
    assert "Numbers that are not finite" in write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    with pytest.warns(Notice, match="no mask can be made"):
        scores = jm.pruning.score(broken, EXAMPLES["red"], EXAMPLES["blue"], out=tmp_path / "scores")
    assert read_run(tmp_path / "scores")["not_finite"]
    with pytest.raises(jm.UserError, match="not all finite"):
        jm.pruning.select(scores, jm.pruning.Rule(q=0.01, p=0.01))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_circuits_and_texts_say_so_too(value: float, plain_model: Model, tmp_path: Path) -> None:
    up = plain_model.params["blocks"]["down"].at[1, 0, 0].set(value)
    broken = replace(plain_model, params={**plain_model.params, "blocks": {**plain_model.params["blocks"], "down": up}})
    with pytest.warns(Notice, match="mlp_out are not all finite"):
        jm.activations(broken, ["ab", "abc"], "mlp_out", out=tmp_path / "a")
    with pytest.raises(jm.UserError, match=r"a: activations at mlp_out are not all finite"):
        stored_reference(str(tmp_path / "a"), broken, ["mlp_out"])
    with pytest.warns(Notice), pytest.raises(jm.UserError, match="not all finite, so they have no mean"):
        jm.mean_difference(broken, ["ab"], ["bc"], "mlp_out")
    with pytest.warns(Notice, match="so no circuit is the best"):
        jm.circuit(broken, tiny.PAIRS[:1], edges=3, random=0)
    for how in ({}, {"temperature": 0.5}):
        with pytest.raises(jm.UserError, match="no likeliest token"):
            jm.generate(broken, ["ab"], 2, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["category", "group", "split", "control"])
def test_other_labels_are_another_run(field: str, plain_model: Model, tmp_path: Path) -> None:
    jm.sweep(plain_model, tiny.PAIRS[:1], unit="mlp_out", layers=[0], out=tmp_path / "run")
    other = [replace(tiny.PAIRS[0], **{field: "heldout" if field == "split" else "neutral"})]
    with pytest.raises(jm.UserError, match="labels"):
        jm.sweep(plain_model, other, unit="mlp_out", layers=[0], out=tmp_path / "run", resume=True)
