"""Pruned models: which weights are edited and which are not, what is exported, what was predicted, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.scoring import example_losses
from jaxmed.cli.main import main
from jaxmed.experiments.measure import make_tests
from jaxmed.models import named_weights as edits
from jaxmed.models.load import load
from jaxmed.models.model import Model
from jaxmed.models.named_weights import matrix_shapes, weights_by_name, with_edited
from jaxmed.pruning import (
    Mask,
    Rule,
    apply_mask,
    score,
    select,
)
from tests import reference, tiny
from tests.pruning_sets import ALL, BEHAVIOUR, PRESERVE, loaded


@pytest.fixture(scope="module")
def scores(plain_model: Model) -> Any:
    return score(plain_model, BEHAVIOUR, PRESERVE, kinds=ALL)


@pytest.mark.parametrize(("to", "factor"), [("zero", 0.0), ("scale", -0.5), ("mean", 0.0)])
def test_exactly_the_named_weights_are_edited(plain_model: Model, scores: Any, to: str, factor: float) -> None:
    mask = select(scores, Rule(q=0.03, p=0.01))
    before = weights_by_name(plain_model)
    edited = apply_mask(plain_model, mask, to, factor)
    after = weights_by_name(edited)
    for name, found in mask.indices.items():
        old, new = before[name].ravel(), after[name].ravel()
        rest = np.setdiff1d(np.arange(old.size), found)
        assert np.array_equal(old[rest].view(np.int32), new[rest].view(np.int32))
        wanted = {"zero": 0 * old[found], "scale": np.float32(factor) * old[found], "mean": np.full(len(found), old[found].mean())}[to]
        assert np.allclose(new[found], wanted, atol=1e-7)
    same = {name: plain_model.params[name] is edited.params[name] for name in ("embedding", "final_norm")}
    assert all(same.values())
    assert (edited.history[-1]["weights"], edited.history[-1]["kind"]) == (mask.count, "pruning")


@pytest.mark.parametrize(
    ("name", "mesh", "at_once"),
    [
        ("llama3.2", "data=2", 200),
        ("llama3.2", "data=1,tensor=2", 1 << 22),
        ("gpt2", "data=2", 1),
        ("phi3", "data=1,tensor=2", 900),
        ("phi3", "fsdp=2", 900),
        ("qwen3-moe", "data=1,tensor=2", 1 << 22),
    ],
)
def test_every_layout_and_mesh_is_edited_where_the_checkpoint_says(
    name: str, mesh: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edits, "AT_ONCE", at_once)
    made = reference.save(name, tmp_path)
    model, rng = load(str(tmp_path), mesh=jm.make_mesh(mesh)), np.random.default_rng(3)
    before = weights_by_name(model)
    shapes = {name: held.shape for name, held in before.items()}
    chosen = {name: np.sort(rng.choice(held.size, held.size // 7, replace=False)) for name, held in before.items()}
    chosen[next(iter(chosen))] = np.zeros(0, np.int64)
    edited = apply_mask(model, Mask(chosen, shapes, model.name, model.identity), "scale", 0.5)
    after = weights_by_name(edited)
    for name, held in made.state_dict().items():
        if name in after and not name.endswith("gate_up_proj"):
            wanted = held.numpy().copy().ravel()
            wanted[chosen[name]] *= 0.5
            assert np.array_equal(after[name].ravel(), wanted), name
    for path, leaf in jax.tree.leaves_with_path(edited.params):
        assert leaf.sharding == dict(jax.tree.leaves_with_path(model.params))[path].sharding, path


def test_parameters_without_a_mesh_are_edited_too(plain_model: Model) -> None:
    alone = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), plain_model.params)
    chosen = {name: np.arange(0, int(np.prod(shape)), 2) for name, shape in matrix_shapes(plain_model.config).items()}
    edited, same = (with_edited(plain_model.config, params, chosen, np.zeros_like) for params in (alone, plain_model.params))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(edited), jax.tree.leaves(same), strict=True))
    assert not np.asarray(edited["blocks"]["qkv"][0]).all()
    assert np.array_equal(alone["blocks"]["down"], plain_model.params["blocks"]["down"])  # a copy is edited


@pytest.mark.slow
def test_exported_models_have_zeros_there_and_nothing_else_changed(tmp_path: Path) -> None:
    model, made = loaded("llama3.2", tmp_path / "model")
    mask = select(score(model, BEHAVIOUR, PRESERVE), Rule(q=0.02, p=0.01))
    jm.export_folder(apply_mask(model, mask), tmp_path / "pruned")
    pruned = reference.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for (name, old), (_, new) in zip(made.state_dict().items(), pruned.state_dict().items(), strict=True):
        wanted = old.numpy().copy().ravel()
        wanted[mask.indices.get(name, np.zeros(0, np.int64))] = 0
        assert np.array_equal(new.numpy().ravel(), wanted), name
    record = json.loads((tmp_path / "pruned" / "jaxmed_edit.json").read_text())
    assert record["edits"][-1]["weights"] == mask.count


def test_attack_masks_stay_in_memory(tmp_path: Path) -> None:
    model, _ = loaded("llama3.2", tmp_path / "model")
    edited = apply_mask(model, select(score(model, BEHAVIOUR, PRESERVE), Rule(q=0.02), tag="attack"))
    with pytest.raises(jm.UserError, match="attack"):
        jm.export_folder(edited, tmp_path / "out")


def test_the_first_order_prediction_is_that_of_small_edits(plain_model: Model, scores: Any) -> None:
    """Scaling the chosen weights by 1 - epsilon changes the mean loss by -epsilon * sum(S) / n, to first order."""
    mask = select(scores, Rule(q=0.05, p=0))
    tests = make_tests(plain_model, {"behaviour": BEHAVIOUR}, "")
    before = example_losses(plain_model, tests.sets["behaviour"]).mean()
    assert abs(before - scores.losses["behaviour"]) < 1e-5
    after = example_losses(apply_mask(plain_model, mask, "scale", 1 - 1e-2), tests.sets["behaviour"]).mean()
    chosen = sum(float(scores.read("behaviour_signed", name).ravel()[found].sum()) for name, found in mask.indices.items())
    predicted = -1e-2 * chosen / len(BEHAVIOUR)
    assert predicted > 1e-4
    assert abs((after - before) / predicted - 1) < 0.1


@pytest.mark.slow
def test_the_commands_go_from_scores_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(folder)
    files = {}
    for name, rows in (("bad", BEHAVIOUR), ("good", PRESERVE)):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"prompt": one.prompt, "response": one.response}) + "\n" for one in rows))
    base = ["--model", str(folder)]
    scoring = [
        "prune",
        "score",
        *base,
        "--behaviour",
        str(files["bad"]),
        "--preserve",
        str(files["good"]),
        "--out",
        str(tmp_path / "scores"),
    ]
    assert main([*scoring, "--dry-run"]) == 0
    assert not (tmp_path / "scores").exists()
    assert main(scoring) == 0
    assert main(scoring) == 2
    masks = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two")}
    for (name, file), q in zip(masks.items(), ("0.02", "0.05"), strict=True):
        assert main(["prune", "select", "--scores", str(tmp_path / "scores"), "--q", q, "--p", "0.01", "--out", str(file)]) == 0, name
    assert main(["prune", "combine", *map(str, masks.values()), "--out", str(tmp_path / "both.safetensors")]) == 0
    assert main(["prune", "compare", *map(str, masks.values()), *base]) == 0
    assert main(["prune", "apply", *base, "--mask", str(masks["one"]), "--out", str(tmp_path / "pruned")]) == 0
    assert jm.load(str(tmp_path / "pruned")).history[-1]["kind"] == "pruning"
    assert main(["prune", "combine", str(masks["one"]), "--how", "invert", "--out", str(tmp_path / "rest.safetensors")]) == 0
    written = []
    for more in ([], ["--mask", str(tmp_path / "rest.safetensors")]):
        capsys.readouterr()
        assert main(["generate", "how to", *base, "--tokens", "6", *more]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] != written[1]
    asked = ["evaluate", *base, "--examples", str(files["bad"]), "--split", "", "--text", "", "--tokens", "2"]
    assert main([*asked, "--mask", str(masks["one"])]) == 0
    tests = ["--tests", str(files["bad"]), str(files["good"]), "--split", "", "--text", ""]
    curve = ["prune", "curve", *base, "--scores", str(tmp_path / "scores"), *tests, "--qs", "0.02", "0.1", "--out", str(tmp_path / "curve")]
    assert main(curve) == 0
    rows = (tmp_path / "curve" / "curve.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + 2 * 2
    assert main([*curve, "--resume"]) == 0
    assert (tmp_path / "curve" / "curve.csv").read_text().splitlines() == rows
    transfer = ["prune", "transfer", *base, "--masks", *map(str, masks.values()), *tests, "--out", str(tmp_path / "transfer")]
    assert main(transfer) == 0
    assert len((tmp_path / "transfer" / "transfer.csv").read_text().splitlines()) == 1 + 2 * 2
    capsys.readouterr()
    assert main(["prune", "select", "--scores", str(tmp_path / "scores"), "--q", "7", "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "q (7.0) is in (0, 1]" in capsys.readouterr().err
    assert main(["prune", "apply", "--mask", str(masks["one"]), "--out", str(tmp_path / "other")]) == 2
    assert "of another model" in capsys.readouterr().err
