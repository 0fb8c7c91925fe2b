"""Every family against transformers, on tiny random models made here: loading, logits, sites, padding, bfloat16, the exact engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.interventions.sites import SITES, has_site
from jaxmed.models.families import read_config
from jaxmed.models.families.llama import llama_json
from tests import naive, reference, tiny, tolerances

torch = reference.torch


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, object]]:
    """Name of a family -> its checkpoint and the model it was saved from; made once."""
    made: dict[str, tuple[Path, object]] = {}

    def get(name: str) -> tuple[Path, object]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family") / name
            made[name] = folder, reference.save(name, folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_logits_and_sites_equal_transformers(folders: Callable, name: str) -> None:
    folder, made = folders(name)
    ids = reference.tokens(90)
    model = jm.load(str(folder))
    sites = tuple(site for site in SITES if has_site(model.config.sizes, site))
    logits, found = jm.forward(model, ids, taps=sites)
    wanted = reference.logits(made, ids)
    assert np.abs(np.asarray(logits) - wanted).max() <= tolerances.TINY_LOGITS
    theirs = reference.sites(made, ids)
    assert theirs.keys() >= set(sites) & {"gate", "up", "neuron"}
    for site, there in theirs.items():
        here = np.asarray(found[site]).reshape(there.shape)
        assert np.abs(here - there).max() <= tolerances.TINY_SITES * max(1.0, np.abs(there).max()), site


@pytest.mark.parametrize("name", [name for name in reference.CONFIGS if "rope_parameters" in reference.CONFIGS[name][1]])
def test_old_rope_fields_mean_the_same(folders: Callable, tmp_path: Path, name: str) -> None:
    made = reference.save(name, tmp_path)
    reference.old_form(tmp_path)
    ids = reference.tokens(30)
    found = np.asarray(jm.forward(jm.load(str(tmp_path)), ids)[0])
    assert np.abs(found - reference.logits(made, ids)).max() <= tolerances.TINY_LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.CONFIGS)
def test_left_padding_changes_nothing(folders: Callable, name: str) -> None:
    model = jm.load(str(folders(name)[0]))
    ids = reference.tokens(26)[0]
    alone = np.asarray(jm.forward(model, ids)[0][0])
    rows = np.stack([np.concatenate([np.full(pads, 7), ids, np.zeros(5 - pads, int)]) for pads in range(6)])
    padded = np.asarray(jm.forward(model, rows, padding=np.arange(6))[0])
    for pads in range(6):
        assert np.abs(padded[pads, pads : pads + 26] - alone).max() <= tolerances.TINY_LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.CONFIGS)
def test_bfloat16_stays_within_the_spread_of_the_reference(folders: Callable, tmp_path: Path, name: str) -> None:
    """The budget is how far the reference's own eager and fused paths lie from its float32 logits."""
    made = reference.save(name, tmp_path, torch.bfloat16)
    ids = reference.tokens(40, rows=3)
    found = np.asarray(jm.forward(jm.load(str(tmp_path), dtype="bfloat16"), ids)[0])
    paths = reference.bfloat16_paths(made, ids)
    exact = reference.logits(made.float(), ids)
    budget = max(reference.typical_distance(path, exact) for path in paths)
    assert reference.typical_distance(found, exact) <= 1.2 * budget


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.CONFIGS)
def test_engine_equals_naive_patching(folders: Callable, name: str) -> None:
    model = jm.load(str(folders(name)[0]))
    model.tokenizer, model.name = tiny.tokenizer(), name
    pair = tiny.PAIRS[1]
    window = 4 if model.config.experts else 7
    table = jm.sweep(model, [pair], ("log-odds",), tiny.units_of(model.config), "user_last", window=window)
    rng = np.random.default_rng(0)
    worst = largest = 0.0
    for unit in tiny.units_of(model.config):
        for layer in range(0, model.config.layers, 2):
            values = np.atleast_1d(table[unit].values[0, layer])
            for index in {int(np.abs(values).argmax()), int(rng.integers(len(values)))}:
                wanted = naive.effects(model, pair, "user_last", unit, layer, index, "log-odds", window)[0]
                worst = max(worst, abs(float(values[index]) - wanted))
                largest = max(largest, abs(wanted))
    assert worst <= tolerances.EFFECTS
    assert largest > 10 * tolerances.EFFECTS, "the compared effects are too small to tell anything"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3.1", "phi3", "gpt2", "olmo2", "mixtral", "qwen3-moe"])
def test_split_weights_give_the_same_logits(folders: Callable, name: str) -> None:
    folder = str(folders(name)[0])
    ids = reference.tokens(20)
    meshes = [jm.make_mesh(mesh) for mesh in ("data=1", "tensor=2", "fsdp=2")]
    found = [np.asarray(jm.forward(jm.load(folder, mesh=mesh), ids)[0]) for mesh in meshes]
    assert max(np.abs(one - found[0]).max() for one in found) <= tolerances.TINY_LOGITS


def test_the_config_of_a_llama_is_read_back() -> None:
    assert read_config(llama_json(tiny.LLAMA))[1] == tiny.LLAMA
