"""Parity: the command finds agreement, finds the place of a planted fault, and works from a stored reference; the self-check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.models.model import Model
from jaxmed.parity import selfcheck
from jaxmed.parity.compare import compare, first_parting, make_reference, read_reference
from jaxmed.parity.selfcheck import self_check
from tests import reference, tiny, tolerances


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "model"
    reference.save("qwen2.5", folder)
    return folder


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("stored") / "reference.safetensors"
    make_reference(jm.load(str(folder)), folder, reference.tokens(30)[0], file)
    return file


def test_a_loaded_model_agrees_at_every_site(folder: Path, stored: Path) -> None:
    differences = compare(jm.load(str(folder)), read_reference(stored))
    assert first_parting(differences, tolerances.TINY_SITES) is None
    assert len(differences) == 4 * 13 + 1


def test_the_first_place_where_they_part_is_named(folder: Path, stored: Path) -> None:
    model = jm.load(str(folder))
    blocks = dict(model.params["blocks"])
    blocks["mlp_norm"] = blocks["mlp_norm"].at[2].mul(1.01)
    parting = first_parting(compare(replace(model, params={**model.params, "blocks": blocks}), read_reference(stored)), 1e-4)
    assert parting is not None
    assert (parting.layer, parting.site) == (2, "gate")


@pytest.mark.slow
def test_the_command_writes_a_reference_and_compares_with_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept, table = tmp_path / "kept.safetensors", tmp_path / "table.csv"
    assert main(["parity", "--model", str(folder), "--tokens", "20", "--write", str(kept)]) == 0
    assert main(["parity", "--model", str(folder), "--reference", str(kept), "--out", str(table)]) == 0
    assert "no site parts" in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == 4 * 13 + 2
    assert main(["parity", "--model", str(folder), "--reference", str(kept), "--tolerance", "1e-12"]) == 1
    assert "first place where they part" in capsys.readouterr().out


def test_bad_references_are_refused(folder: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert main(["parity", "--model", str(folder), "--reference", str(tmp_path / "empty")]) == 2
    assert main(["parity", "--model", str(folder), "--reference", str(tmp_path / "absent")]) == 2
    assert main(["parity", "--model", str(folder), "--write", str(stored)]) == 2
    assert "exists already" in capsys.readouterr().err
    reference.save("llama2", tmp_path / "other")
    other = jm.load(str(tmp_path / "other"))
    with pytest.raises(jm.UserError, match="another model"):
        compare(replace(other, config=replace(other.config, vocabulary=300)), read_reference(stored))


def test_a_sound_model_passes_the_self_check(tiny_model: Model) -> None:
    self_check(tiny_model)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("final_norm", lambda x: x * jnp.nan, "not finite"),
        ("embedding", lambda x: x[:, :8], "parameter embedding"),
        ("final_norm", lambda x: x * 0, "does not reach the logits"),
    ],
)
def test_the_self_check_says_what_is_wrong(plain_model: Model, name: str, change, said: str) -> None:
    params = jax.tree.map(lambda x: x, plain_model.params)
    params[name] = change(params[name])
    with pytest.raises(jm.UserError, match=said):
        self_check(replace(plain_model, params=params))


def test_the_reference_has_the_sites_of_the_model(stored: Path) -> None:
    held = read_reference(stored)
    assert held.tokens.dtype == np.int32
    assert "transformers" in held.made_by


def test_loading_checks_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr("jaxmed.loading.check_once", checked.append)
    jm.load(str(folder), check=False)
    assert not checked
    assert checked == [jm.load(str(folder))]


def test_a_loaded_model_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    folder, runs = tiny.write_checkpoint(tmp_path / "model"), []
    monkeypatch.setattr(selfcheck, "_run", lambda model: runs.append(model) or [])
    for _ in range(2):
        jm.load(str(folder))
    assert len(runs) == 1
    jm.load(str(folder), dtype="bfloat16")
    tiny.write_checkpoint(folder, rope_theta=2e4)
    jm.load(str(folder))
    assert len(runs) == 3
    monkeypatch.setattr(selfcheck, "_run", lambda model: ["it fails"])
    for _ in range(2):
        with pytest.raises(jm.UserError, match="it fails"):
            jm.load(str(folder), mesh=jm.make_mesh("data=1"))
