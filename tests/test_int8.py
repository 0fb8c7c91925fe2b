"""int8 weights: what is stored, how close the logits stay, and that the engine is exact on the quantised model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.mediators import MEDIATORS
from tests import naive, reference, tiny, tolerances


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "model"
    reference.save("gemma2", folder)
    return folder


def test_weights_lie_within_half_a_step(folder: Path) -> None:
    exact, narrow = (jm.load(str(folder), int8=int8).params["blocks"] for int8 in (False, True))
    for name, axes in {"qkv": (1,), "out": (1, 2), "gate_up": (1,), "down": (1,)}.items():
        scale = np.expand_dims(np.asarray(narrow[name + "_scale"]), axes)
        assert narrow[name].dtype == np.int8
        assert np.abs(np.asarray(narrow[name]) * scale - np.asarray(exact[name])).max() <= 0.5001 * scale.max()


def test_logits_stay_close_on_every_mesh(folder: Path) -> None:
    ids = reference.tokens(30)
    exact = np.asarray(jm.forward(jm.load(str(folder)), ids)[0])
    meshes = [jm.make_mesh(mesh) for mesh in ("data=1", "tensor=2", "fsdp=2")]
    narrow = [np.asarray(jm.forward(jm.load(str(folder), int8=True, mesh=mesh), ids)[0]) for mesh in meshes]
    assert np.corrcoef(exact.ravel(), narrow[0].ravel())[0, 1] > 0.999
    assert np.abs(exact - narrow[0]).max() > 1e-4
    assert max(np.abs(narrow[0] - one).max() for one in narrow) <= tolerances.TINY_LOGITS


@pytest.mark.slow
def test_the_engine_is_exact_on_the_quantised_model(folder: Path) -> None:
    model = jm.load(str(folder), int8=True)
    model.tokenizer, model.name = tiny.tokenizer(), "int8"
    table = jm.sweep(model, tiny.PAIRS[:1], unit=tuple(MEDIATORS), window=7)
    for unit in ("neuron", "head_out", "mlp_out"):
        values = np.atleast_1d(table[unit].values[0, 1])
        index = int(np.abs(values).argmax())
        wanted = naive.effects(model, tiny.PAIRS[0], "last", unit, 1, index, "log-odds", 7)[0]
        assert float(values[index]) == pytest.approx(wanted, abs=tolerances.EFFECTS)


def test_a_template_can_be_borrowed(folder: Path, tmp_path: Path) -> None:
    reference.save("llama2", tmp_path / "base")
    with pytest.raises(jm.UserError, match="no tokenizer files"):
        jm.load(str(tmp_path / "base"), template_from=str(folder))
    plain = tiny.tokenizer().__class__(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    plain.save_pretrained(tmp_path / "base")
    with pytest.raises(jm.UserError, match="no chat template"):
        jm.load(str(tmp_path / "base"), template_from=str(tmp_path / "base"))
    tiny.tokenizer().save_pretrained(tmp_path / "chat")
    reference.save("llama2", tmp_path / "chat")
    assert jm.load(str(tmp_path / "base"), template_from=str(tmp_path / "chat")).tokenizer.chat_template == tiny.TEMPLATE
