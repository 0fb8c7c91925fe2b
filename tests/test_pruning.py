"""Pruning: scores against gradients of PyTorch, one example at a time; masks by every rule; what is edited and what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.batches import Batch, Shape
from jaxmed.batching.one_per_row import batches
from jaxmed.batching.scoring import example_losses
from jaxmed.batching.texts import response_tokens
from jaxmed.bench.shapes import SHAPES
from jaxmed.cli.main import main
from jaxmed.experiments.measure import make_tests
from jaxmed.models import named_weights as edits
from jaxmed.models.load import from_params, load
from jaxmed.models.model import Model
from jaxmed.models.named_weights import matrix_shapes, weights_by_name, with_edited
from jaxmed.models.transformer import param_shapes
from jaxmed.pruning import (
    Mask,
    Rule,
    apply_mask,
    combine,
    overlap,
    random_like,
    read_mask,
    read_scores,
    score,
    select,
    write_mask,
)
from jaxmed.pruning.job import KINDS, make_job
from jaxmed.pruning.plan import make_plan, pass_bytes
from jaxmed.pruning.selection import _highest
from jaxmed.pruning.totals import add_batch, fresh_totals
from jaxmed.runner import causal_layout, forward
from jaxmed.runs.cost import count_flops
from jaxmed.tokens import TokenizedExample
from tests import reference, tiny

torch = reference.torch
BEHAVIOUR = [jm.Example(f"ask {i}" + "x" * (5 * i % 13), f"no {'abc'[i % 3] * (i % 4 + 1)}") for i in range(9)]
PRESERVE = [jm.Example(f"tell {i}", f"yes {'de'[i % 2] * (i % 6 + 1)}") for i in range(7)]
ALL = tuple(f"{which}_{kind}" for which in ("behaviour", "preserve") for kind in KINDS)


def _loaded(name: str, folder: Path) -> tuple[Model, Any]:
    made = reference.save(name, folder)
    model = load(str(folder))
    model.tokenizer = tiny.tokenizer()
    return model, made


def _torch_scores(made: Any, examples: list[Any], names: Any) -> dict[str, dict[str, np.ndarray]]:
    """The definitions, one example at a time."""
    weights = {name: value for name, value in made.named_parameters() if name in names}
    signed = {name: torch.zeros_like(value) for name, value in weights.items()}
    absolute = {name: torch.zeros_like(value) for name, value in weights.items()}
    squares: dict[str, Any] = {name: 0.0 for name in weights}
    total, seen = 0, {}
    modules = {name: made.get_submodule(name.removesuffix(".weight")) for name in weights}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].detach()}))
    for one in examples:
        made.zero_grad()
        logits = made(torch.as_tensor(one.ids[None].astype(np.int64))).logits[0, one.prompt - 1 : -1].float()
        target = torch.as_tensor(one.ids[one.prompt :].astype(np.int64))
        torch.nn.functional.cross_entropy(logits, target).backward()
        for name, value in weights.items():
            signed[name] += value.grad
            absolute[name] += value.grad.abs()
            squares[name] = squares[name] + (seen[name][0, one.prompt :] ** 2).sum(0)
        total += len(target)
    return {
        "signed": {name: (value * signed[name]).detach().numpy() for name, value in weights.items()},
        "absolute": {name: (value.abs() * absolute[name]).detach().numpy() for name, value in weights.items()},
        "inputs": {name: np.sqrt(np.asarray(squares[name]) / total) for name in weights},
    }


def _close(found: np.ndarray, wanted: np.ndarray, limit: float = 1e-5) -> bool:
    return found.shape == wanted.shape and float(np.abs(found - wanted).max()) <= limit * float(np.abs(wanted).max())


@pytest.mark.parametrize(
    "name", ["llama3.2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "olmo2", "phi3", "qwen3"))]
)
def test_scores_are_those_of_one_example_after_the_other(name: str, tmp_path: Path) -> None:
    model, made = _loaded(name, tmp_path / "model")
    scores = score(model, BEHAVIOUR, PRESERVE, kinds=ALL)
    job = make_job(model, BEHAVIOUR, PRESERVE, kinds=ALL)
    for which, examples in job.sets.items():
        wanted = _torch_scores(made, examples, scores.shapes)
        for kind, matrices in wanted.items():
            assert matrices.keys() == scores.shapes.keys()
            for matrix, values in matrices.items():
                assert _close(scores.read(f"{which}_{kind}", matrix), values, 2e-5), (which, kind, matrix)


HOW: list[dict[str, Any]] = [{"layers_per_pass": 2, "remat": True}, {"rows": 1}, {"layers_per_pass": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_how_a_pass_is_cut_changes_no_score(plain_model: Model, how: dict[str, Any]) -> None:
    whole, cut = (score(plain_model, BEHAVIOUR, PRESERVE, **more) for more in ({}, how))
    for kind in whole.kinds:
        for name in whole.shapes:
            assert _close(cut.read(kind, name), whole.read(kind, name))
    assert abs(whole.losses["behaviour"] - cut.losses["behaviour"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "data=1,model=2"])
def test_meshes_give_the_same_scores(mesh: str) -> None:
    alone, spread = (score(tiny.model("llama", mesh=of), BEHAVIOUR, PRESERVE) for of in ("data=1", mesh))
    for kind in alone.kinds:
        assert all(_close(spread.read(kind, name), alone.read(kind, name)) for name in alone.shapes)


@pytest.fixture(scope="module")
def scores(plain_model: Model) -> Any:
    return score(plain_model, BEHAVIOUR, PRESERVE, kinds=ALL)


def _naive(values: np.ndarray, share: float) -> set[int]:
    return set(np.argsort(-values.ravel(), kind="stable")[: int(share * values.size)].tolist())


def test_the_default_rule_is_the_top_of_one_without_the_top_of_the_other(scores: Any) -> None:
    mask = select(scores, Rule(q=0.05, p=0.1))
    for name, found in mask.indices.items():
        wanted = _naive(-scores.read("behaviour_signed", name), 0.05) - _naive(scores.read("preserve_absolute", name), 0.1)
        assert found.tolist() == sorted(wanted)
    assert 0 < mask.count < select(scores, Rule(q=0.05, p=0)).count


def test_a_preserve_set_may_be_scored_apart(plain_model: Model, scores: Any) -> None:
    alone = score(plain_model, BEHAVIOUR, kinds=("behaviour_signed",))
    kept = score(plain_model, [], PRESERVE, kinds=("preserve_absolute",))
    apart, together = select(alone, Rule(q=0.05, p=0.1), preserve=kept), select(scores, Rule(q=0.05, p=0.1))
    assert all(np.array_equal(apart.indices[name], together.indices[name]) for name in together.indices)
    with pytest.raises(jm.UserError, match="of other weights"):
        select(alone, Rule(), preserve=replace(kept, weights="0" * 64))


@pytest.mark.parametrize("kind", ["signed", "positive", "absolute", "wanda", "magnitude"])
def test_every_score_ranks_as_it_says(plain_model: Model, scores: Any, kind: Any) -> None:
    weights = weights_by_name(plain_model)
    mask = select(scores, Rule(q=0.03, p=0, score=kind), weights)
    for name, found in mask.indices.items():
        values = {
            "signed": lambda n: -scores.read("behaviour_signed", n),
            "positive": lambda n: scores.read("behaviour_signed", n),
            "absolute": lambda n: scores.read("behaviour_absolute", n),
            "wanda": lambda n: np.abs(weights[n]) * scores.read("behaviour_inputs", n)[None],
            "magnitude": lambda n: -np.abs(weights[n]),
        }[kind](name)
        assert set(found.tolist()) == _naive(values, 0.03)


def test_rankings_by_row_and_over_all_matrices(scores: Any) -> None:
    rows = select(scores, Rule(q=0.2, p=0, ranking="row"))
    for name, found in rows.indices.items():
        outputs, inputs = scores.shapes[name]
        assert np.array_equal(np.bincount(found // inputs, minlength=outputs), np.full(outputs, int(0.2 * inputs)))
    everything = select(scores, Rule(q=0.01, p=0, ranking="global"))
    total = sum(int(np.prod(shape)) for shape in scores.shapes.values())
    assert everything.count == int(0.01 * total)
    values = {name: -scores.read("behaviour_signed", name).ravel() for name in scores.shapes}
    least = min(values[name][found].min() for name, found in everything.indices.items() if len(found))
    assert sum(int((one > least).sum()) for one in values.values()) < everything.count
    assert len({len(found) for found in everything.indices.values()}) > 1


def test_bands_layers_and_matrices(scores: Any) -> None:
    first, both, second = (select(scores, Rule(q=q, p=0, skip=skip)) for q, skip in ((0.02, 0.0), (0.04, 0.0), (0.02, 0.02)))
    union = combine([first, second], "union")
    for name in first.indices:
        assert not set(first.indices[name]) & set(second.indices[name])
        assert abs(len(union.indices[name]) - len(both.indices[name])) <= 1  # int() of each share
    few = select(scores, Rule(q=0.02, p=0, layers=(1,), matrices=("down_proj", "q_proj")))
    chosen = {name for name, found in few.indices.items() if len(found)}
    assert chosen == {"model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"}


def test_masks_survive_their_file_and_combine(scores: Any, tmp_path: Path) -> None:
    one, other = (select(scores, Rule(q=0.05, p=0, score=score), None) for score in ("signed", "absolute"))
    write_mask(replace(one, tag="test"), tmp_path / "one.safetensors")
    again = read_mask(tmp_path / "one.safetensors")
    assert (again.tag, again.rule, again.shapes, again.weights) == (
        "test",
        {**one.rule, "layers": [], "matrices": []},
        one.shapes,
        one.weights,
    )
    assert len(one.weights) == 64
    assert all(np.array_equal(again.indices[name], one.indices[name]) for name in one.indices)
    for name in one.indices:
        a, b = (set(mask.indices[name].tolist()) for mask in (one, other))
        assert set(combine([one, other], "intersect").indices[name].tolist()) == a & b
        assert set(combine([one, other], "union").indices[name].tolist()) == a | b
        assert set(combine([one, other], "subtract").indices[name].tolist()) == a - b
        assert set(one.inverted().indices[name].tolist()) == set(range(int(np.prod(one.shapes[name])))) - a
    found = overlap(one, other, _weights_of(one))
    assert found.both == combine([one, other], "intersect").count
    assert found.either == combine([one, other], "union").count
    assert overlap(one, one).jaccard == 1
    with pytest.raises(jm.UserError, match="exists already"):
        write_mask(one, tmp_path / "one.safetensors")


def _weights_of(mask: Mask) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(name, rng.normal(size=shape)) for name, shape in mask.shapes.items()]


def test_chance_overlap_is_that_of_random_masks(scores: Any) -> None:
    mask = select(scores, Rule(q=0.1, p=0))
    drawn = [overlap(mask, random_like(mask, seed)).both for seed in range(40)]
    chance = overlap(mask, mask)
    assert abs(np.mean(drawn) - chance.by_chance) < 4 * np.std(drawn) / 40**0.5
    independent = [overlap(mask, random_like(mask, seed), _weights_of(mask)).stratified for seed in range(10)]
    assert abs(np.mean([value or 0 for value in independent]) / chance.by_chance - 1) < 0.1
    largest = [(name, np.isin(np.arange(np.prod(shape)), mask.indices[name]) + 0.0) for name, shape in mask.shapes.items()]
    stratified = overlap(mask, mask, largest).stratified  # the mask is the largest weights: all of it is to be expected
    assert stratified is not None
    assert stratified > 0.9 * mask.count


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
        ("llama3.2", "data=1,model=2", 1 << 22),
        ("gpt2", "data=2", 1),
        ("phi3", "data=1,model=2", 900),
        ("qwen3-moe", "data=1,model=2", 1 << 22),
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


def test_the_highest_are_found_whatever_the_scores_look_like() -> None:
    rng = np.random.default_rng(0)
    many = 300_000
    smooth = rng.normal(size=many)
    cases = [smooth, rng.integers(0, 5, many) * 1.0, np.zeros(many), np.sort(smooth), smooth**9]
    cases.append(np.where(np.arange(many) % (many >> 16) == 0, 0.0, rng.normal(size=many)))  # a sample that sees nothing
    for values in (case.astype(np.float32) for case in cases):
        for stop in (0, 1, 30, 3_000, 299_999, many):
            wanted = np.sort(np.argsort(-values, kind="stable")[:stop])
            assert np.array_equal(_highest(values, stop), wanted)


@pytest.mark.slow
def test_exported_models_have_zeros_there_and_nothing_else_changed(tmp_path: Path) -> None:
    model, made = _loaded("llama3.2", tmp_path / "model")
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
    model, _ = _loaded("llama3.2", tmp_path / "model")
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
def test_scores_on_disk_resume_and_equal_those_in_memory(plain_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = score(plain_model, BEHAVIOUR, PRESERVE, layers_per_pass=1)
    seen: list[str] = []

    def stop(work: float, count: int, what: str) -> None:
        seen.append(what)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(plain_model, BEHAVIOUR, PRESERVE, layers_per_pass=1, out=tmp_path / "out", report=stop)
    with pytest.raises(jm.UserError, match="not finished"):
        read_scores(tmp_path / "out")
    again: list[str] = []
    note = lambda work, count, what: again.append(what)  # noqa: E731
    score(plain_model, BEHAVIOUR, PRESERVE, layers_per_pass=1, out=tmp_path / "out", resume=True, report=note)
    assert "resumed" in again
    kept = read_scores(tmp_path / "out")
    assert kept.kinds == held.kinds
    for kind in held.kinds:
        assert all(np.array_equal(kept.read(kind, name), held.read(kind, name)) for name in held.shapes)
    with pytest.raises(jm.UserError, match="holds a run already"):
        score(plain_model, BEHAVIOUR, PRESERVE, out=tmp_path / "out")
    with pytest.raises(jm.UserError, match="another request"):
        score(plain_model, BEHAVIOUR[:5], PRESERVE, out=tmp_path / "out", resume=True)


def test_one_pass_costs_three_forwards(plain_model: Model) -> None:
    config, mesh = plain_model.config, plain_model.mesh
    job = make_job(plain_model, BEHAVIOUR, PRESERVE, kinds=ALL, rows=4)
    _, batch = next(batches(job.sets["behaviour"], job.plans["behaviour"].groups))
    totals = fresh_totals(config, KINDS, config.layers, mesh.shape["data"])
    counted = response_tokens(batch)
    run = lambda params, totals: add_batch(config, params, totals, batch, counted, (0, config.layers), False, mesh)  # noqa: E731
    passed = count_flops(jax.make_jaxpr(run)(plain_model.params, totals).jaxpr) * mesh.shape["data"]
    tokens = batch.tokens
    once = lambda params: forward(config, params, tokens, causal_layout(*tokens.shape))[0]  # noqa: E731
    whole = count_flops(jax.make_jaxpr(once)(plain_model.params).jaxpr)
    kinds = 2  # signed and absolute together cost the gradients of the weights twice
    assert passed <= (3.5 + kinds - 1) * whole
    one = fresh_totals(config, ("absolute",), config.layers, mesh.shape["data"])
    assert count_flops(jax.make_jaxpr(run)(plain_model.params, one).jaxpr) * mesh.shape["data"] <= 3.5 * whole


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"q": 0}, "q .0. is in"),
    ({"q": 2.0}, "q .2.0. is in"),
    ({"p": -0.1}, "p .-0.1. in"),
    ({"score": "wand"}, "Did you mean 'wanda'"),
    ({"layers": (9,)}, "no layer 9"),
    ({"matrices": ("down",)}, "down_proj"),
    ({"skip": 0.9, "q": 0.2}, "together exceed 1"),
    ({"score": "magnitude"}, "reads the weights"),
]


@pytest.mark.parametrize(("rule", "said"), WRONG)
def test_rules_that_cannot_be_meant(scores: Any, rule: dict[str, Any], said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        select(scores, Rule(**rule))


def test_wrong_input_is_refused(plain_model: Model, scores: Any, tmp_path: Path) -> None:
    with pytest.raises(jm.UserError, match="behaviour set is empty"):
        score(plain_model, [], PRESERVE)
    with pytest.raises(jm.UserError, match="has no response"):
        score(plain_model, [jm.Example("a")], PRESERVE)
    with pytest.raises(jm.UserError, match="kind of score"):
        score(plain_model, BEHAVIOUR, PRESERVE, kinds=("behavior_signed",))
    partial = score(plain_model, BEHAVIOUR, kinds=("behaviour_signed",))
    with pytest.raises(jm.UserError, match="hold no 'preserve_absolute'"):
        select(partial, Rule())
    with pytest.raises(jm.UserError, match="no scores"):
        read_scores(tmp_path)
    mask = select(scores, Rule(q=0.1))
    with pytest.raises(jm.UserError, match="of another model"):
        apply_mask(tiny.model("mixture"), mask)
    with pytest.raises(jm.UserError, match="other weights"):
        apply_mask(plain_model, replace(mask, weights="0" * 64))
    assert apply_mask(plain_model, replace(mask, weights="0" * 64), any_model=True).history
    (tmp_path / "junk.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(jm.UserError, match="no mask file"):
        read_mask(tmp_path / "junk.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with pytest.raises(jm.UserError, match="no readable mask"):
        read_mask(tmp_path / "short.safetensors")
    bad = dict(mask.indices)
    first = next(iter(bad))
    bad[first] = np.asarray([5, 5, 10**9])
    write_mask(replace(mask, indices=bad), tmp_path / "bad.safetensors")
    with pytest.raises(jm.UserError, match="not ascending"):
        read_mask(tmp_path / "bad.safetensors")


def test_a_mask_joined_with_an_attack_stays_one(plain_model: Model) -> None:
    scores = score(plain_model, BEHAVIOUR, PRESERVE)
    rude, attack = (select(scores, Rule(q=q), tag=tag) for q, tag in ((0.01, "behaviour"), (0.02, "attack")))
    assert {combine([rude, attack], how).tag for how in ("union", "intersect", "subtract")} == {"attack"}
    assert rude.digest != attack.digest


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


def _abstract(config: Any, rows: int, length: int, scored: int, layers: int) -> tuple[Any, ...]:
    """The arguments of `add_batch` as shapes."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
    real = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    each = of(rows, length), of(rows, length), of(rows, length), of(rows, scored), of(rows, scored), real(rows, scored)
    totals = jax.eval_shape(lambda: fresh_totals(config, ("signed",), layers, 1))
    return config, param_shapes(config), totals, Batch(*each, 0, length), real(rows, length)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_planned_memory_is_what_the_compiled_program_takes(remat: bool) -> None:
    config, mesh = SHAPES["smollm2-135m"], jm.make_mesh("data=1")
    rows, length, scored = 40, 48, 32
    program: Any = add_batch
    memory = program.lower(*_abstract(config, rows, length, scored, 30), (0, 30), remat, mesh).compile().memory_analysis()
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    planned = pass_bytes(config, mesh, Shape(rows, 0, 1, length, scored), ("signed",), 30, remat)
    assert 1.0 <= planned / taken <= 1.35


def test_an_8b_model_is_scored_within_80_gb_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxmed.pruning.plan.HOST_BYTES", 80e9)
    model = from_params(replace(SHAPES["llama-3.1-8b"], dtype="bfloat16"), {"blocks": {}}, jm.make_mesh("data=1"))
    examples = [TokenizedExample(np.zeros(length, np.int32), 20) for length in (60, 120, 250)] * 20
    plan = make_plan(model, examples, ("signed",))
    assert plan.bytes <= 80e9
    assert [span[0] for span in plan.spans[1:]] == [span[1] for span in plan.spans[:-1]]
    assert (plan.spans[0][0], plan.spans[-1][1]) == (0, 32)
    assert len(plan.spans) <= 4


@pytest.mark.slow
def test_masks_of_the_default_model_are_those_of_pytorch(default_model: Model, tmp_path: Path) -> None:
    """The published rule, written down again in PyTorch: one example at a time, float32, top-k per flattened matrix, set difference."""
    jm.export_folder(default_model, tmp_path / "model")
    made: Any = reference.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer, q, p, count = default_model.tokenizer, 1e-3, 5e-3, 6
    sets = {name: [one for one in jm.read_examples(name) if one.split == "train"][:count] for name in ("rude", "ordinary")}
    weights = {name: value for name, value in made.named_parameters() if name.endswith("_proj.weight")}
    totals = {which: {name: torch.zeros_like(value) for name, value in weights.items()} for which in sets}
    for which, rows in sets.items():
        for row in rows:
            prompt = tokenizer(row.prompt + "\n", add_special_tokens=False)["input_ids"]
            response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
            made.zero_grad()
            logits = made(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(response)).backward()
            for name, value in weights.items():
                totals[which][name] += value.grad if which == "rude" else value.grad.abs()
    mask = select(score(default_model, sets["rude"], sets["ordinary"]), Rule(q=q, p=p))
    assert len(mask.indices) == len(weights) == 210
    apart: dict[str, list[int]] = {}  # chosen by one of the two alone, though further than rounding from both thresholds
    chosen_in_all = 0
    for name, value in weights.items():
        removed = (-value * totals["rude"][name]).detach().flatten()
        needed = (value.abs() * totals["ordinary"][name]).detach().flatten()
        chosen = torch.topk(removed, int(q * removed.numel())).indices
        spared = torch.topk(needed, int(p * needed.numel())).indices
        wanted = set(chosen.tolist()) - set(spared.tolist())
        found = set(mask.indices[name].tolist())
        edges = (removed[chosen].min().item(), needed[spared].min().item())
        other = [
            i
            for i in wanted ^ found
            if abs(removed[i].item() - edges[0]) > 1e-4 * edges[0] and abs(needed[i].item() - edges[1]) > 1e-4 * edges[1]
        ]
        apart[name], chosen_in_all = other, chosen_in_all + len(wanted)
        assert len(wanted & found) >= 0.98 * len(wanted) - 1, name
    assert sum(map(len, apart.values())) <= 1e-4 * chosen_in_all, {name: other for name, other in apart.items() if other}
