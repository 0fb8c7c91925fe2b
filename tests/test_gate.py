"""From single effects to a verdict: planted gates are told from what merely adds, and every number against an independent way to it."""

from __future__ import annotations

import csv
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.effects.contrast import Reading, make_contrast
from jaxmed.effects.cost import plan
from jaxmed.effects.sets import read_sets
from jaxmed.errors import UserError
from jaxmed.evaluation.perplexity import perplexity
from jaxmed.files import read_csv, write_csv
from jaxmed.gating.cases import Case, Layout, make_cases
from jaxmed.gating.clamp import CLAMPS, Clamp, Group, Judging, clamp_edits, clamp_perplexity, clamp_verdicts, read_group
from jaxmed.gating.job import GateRequest, make_gate
from jaxmed.gating.rankings import RANKINGS, Evidence, matched, measure_features, order
from jaxmed.gating.run import RULES, choose, measured, run_gate
from jaxmed.gating.spec import GateSpec
from jaxmed.gating.verdicts import adjacency, gating, gini, participation, smallest, sufficiency, whole_layer
from jaxmed.generation import generate_ids
from jaxmed.models.model import Model
from jaxmed.results import open_results
from jaxmed.tokens import text_ids
from tests import tiny

QUICK: dict[str, Any] = {"windows": (8,), "draws": 2, "shuffles": 19, "tokens": 2, "text": ""}


@cache
def _planted(name: str) -> Any:
    return jm.planted(name)


@pytest.fixture(scope="module", params=["gate", "adder"])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A study of a planted model: its name, the job, the folder."""
    planted, out = _planted(request.param), tmp_path_factory.mktemp("gate") / "run"
    job = make_gate(planted.model, planted.pairs, GateRequest(GateSpec(**QUICK), "logit-diff", form="text"))
    run_gate(job, out)
    return request.param, job, out


def _verdicts(out: Path) -> dict[str, dict[str, str]]:
    with (out / "verdicts.csv").open(encoding="utf-8") as file:
        return {row["claim"]: row for row in csv.DictReader(file)}


def test_a_gate_is_told_from_what_merely_adds(study: tuple[str, Any, Path]) -> None:
    name, job, out = study
    found, planted = _verdicts(out), _planted(name)
    enough = found["a small group of neurons has 80% of the effect of the layer's MLP"]
    assert (enough["verdict"], float(enough["estimate"])) == ("supported", 2)  # 0.5 and 0.35 of the effect are planted
    gate = found["the group gates the effect of the strongest earlier mlp_out"]
    assert gate["verdict"] == ("supported" if name == "gate" else "not supported")
    assert float(gate["estimate"]) == pytest.approx(0.85 * planted.gating_index, abs=0.03)
    effects = measured(job, out)
    rows = {(case.role, case.by, case.k): effects.by_group(values).mean() for case, values in effects.effects.items() if not case.draw}
    all_of_them = 1 - rows["held", "strongest earlier mlp_out", 4] / rows["upstream", "strongest earlier mlp_out", 0]
    assert all_of_them == pytest.approx(planted.gating_index, abs=0.03)  # three neurons are planted


def test_groups_are_chosen_by_pairs_that_do_not_test_them(study: tuple[str, Any, Path]) -> None:
    name, job, out = study
    groups = [{job.pairs[number].group for number in job.discovery(half)} for half in (0, 1)]
    for half in (0, 1):
        assert not groups[half] & {pair.group for pair in job.tested(half) if not pair.control}
    assert groups[0] | groups[1] == {pair.group for pair in job.pairs if not pair.control}
    planted = {unit.index for unit in _planted(name).units if unit.mediator == "neuron" and unit.layer == 3}
    for half in (0, 1):
        chosen = choose(job, out, half)
        assert set(order("effect", chosen.evidence)[:3].tolist()) == planted
        assert set(order("attribution", chosen.evidence)[:3].tolist()) == planted


def test_all_neurons_together_are_the_mlp_and_the_rest_completes_them(study: tuple[str, Any, Path]) -> None:
    _, job, out = study
    found = measured(job, out)
    assert np.abs(found.effects[Case("top", "effect", 32)] - found.whole).max() <= 1e-4
    assert np.abs(found.effects[Case("rest", "effect", 16)]).max() < 0.1 * np.abs(found.whole).max()
    neurons = open_results(out / "neurons").neuron.sel(layer=3).values
    for half in (0, 1):
        first = order("effect", choose(job, out, half).evidence)[0]
        mine = job.halves == half
        assert np.abs(found.effects[Case("top", "effect", 1)][mine] - neurons[mine][:, first]).max() <= 1e-4


def test_plans_count_what_will_run(study: tuple[str, Any, Path]) -> None:
    _, job, out = study
    for half in (0, 1):
        real = job.joint(half, read_sets(out / f"sets{half + 1}.json"))
        assert plan(job.stand_in(half)).cost.passes == plan(real).cost.passes
        assert plan(job.stand_in(half)).cost.flops == pytest.approx(plan(real).cost.flops, rel=0.5), "upstream modules are not known yet"


def test_a_finished_study_is_resumed_and_redrawn_without_change(study: tuple[str, Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, job, out = study
    before = [(out / name).read_bytes() for name in ("gate.csv", "verdicts.csv", "sets1.json")]
    run_gate(job, out, resume=True)
    assert before == [(out / name).read_bytes() for name in ("gate.csv", "verdicts.csv", "sets1.json")]
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "How many neurons are enough" in page
    assert len(page) < 3e6
    other = make_gate(job.model, job.pairs, GateRequest(GateSpec(**{**QUICK, "seed": 1}), "logit-diff", form="text"))
    with pytest.raises(UserError, match="another request"):
        run_gate(other, out, resume=True)
    capsys.readouterr()


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("four_norms", "mixture"))])
@pytest.mark.parametrize(("layer", "position"), [(0, "user"), (2, "last")])
def test_attribution_is_the_derivative_of_patching(kind: str, layer: int, position: str) -> None:
    """The outcome of a full forward in which every neuron of the layer has moved a little toward its source value."""
    model, pair = tiny.model(kind), replace(tiny.PAIRS[0], target=tiny.PAIRS[0].target[:1], foil=tiny.PAIRS[0].foil[:1])
    contrast = make_contrast(model, pair, Reading("pair", position, "chat", ("logit-diff",)))
    found = measure_features(model, [contrast], "logit-diff", layer).attribution[0]
    source = np.asarray(jm.forward(model, contrast.source.ids, taps=("neuron",))[1]["neuron"])
    value = np.zeros((model.config.layers, 1, len(contrast.base.ids), model.config.neurons), np.float32)
    touched = np.zeros_like(value)
    value[layer, 0, list(contrast.patches[0].base)] = source[layer, 0, list(contrast.patches[0].source)]
    touched[layer, 0, list(contrast.patches[0].base)] = 1
    target, foil = (ids[0] for ids in contrast.answers.ids)

    def outcome(gate: jax.Array) -> jax.Array:
        logits = jm.forward(model, contrast.base.ids, {"neuron": jm.Edit(touched * gate[None, None, None], value)}, logits="last")[0][0, 0]
        return logits[target] - logits[foil]

    wanted = jax.grad(outcome)(np.zeros(model.config.neurons, np.float32))
    assert np.abs(np.asarray(found) - np.asarray(wanted)).max() <= 1e-4 * max(1.0, float(np.abs(wanted).max()))
    assert float(np.abs(wanted).max()) > 1e-3


def _features(rng: np.random.Generator, neurons: int = 64) -> Any:
    from jaxmed.gating.rankings import Features

    make = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return Features(make(6, neurons), make(6, neurons), make(6, neurons), make(6, 8), make(neurons, 8))


def test_rankings_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    features = _features(rng)
    evidence = Evidence(rng.normal(size=64), -1.0, features, 3)
    change = features.source - features.base
    wanted = {
        "effect": evidence.effect,
        "attribution": -features.attribution.mean(0),
        "activation": np.abs(change.mean(0)),
        "change": np.sqrt((change**2).mean(0)),
        "norm": np.sqrt((features.written**2).sum(1)),
        "direction": change.mean(0) * (features.written @ features.direction.mean(0)),
    }
    for name, score in wanted.items():
        assert order(name, evidence).tolist() == np.argsort(-score, kind="stable").tolist(), name
    assert sorted(order("random", evidence).tolist()) == list(range(64))
    assert set(RANKINGS) == {*wanted, "random"}


def test_matched_neurons_are_others_of_like_size() -> None:
    size = np.arange(200, dtype=float)
    chosen = np.asarray([3, 100, 101, 102, 199])
    found = matched(chosen, size, (0, 1))
    assert len(set(found.tolist())) == 5
    assert not set(found.tolist()) & set(chosen.tolist())
    assert np.abs(np.sort(size[found]) - np.sort(size[chosen])).max() <= 20
    assert matched(chosen, size, (0, 1)).tolist() == found.tolist()
    assert matched(chosen, size, (0, 2)).tolist() != found.tolist()


def test_cases_have_names_of_their_own() -> None:
    cases = make_cases(Layout(3, 2, 32, (1, 2, 4, 32), ("strongest earlier mlp_out",), (8, 16), 2, 3))
    assert len({case.name for case in cases}) == len(cases)
    assert {case.role for case in cases if case.k == 32} == {
        "top",
        "other layer",
        "held",
    }  # nobody is left to be drawn, and nothing is the rest


GROUPS = np.linspace(0.9, 1.1, 12)


def test_verdicts_follow_from_shares_and_intervals() -> None:
    whole, total = GROUPS * 4, GROUPS * 8
    assert whole_layer(3, whole, total).verdict == "supported"
    assert whole_layer(3, whole * 0.01, total).verdict == "not supported", "significant, but a two-hundredth of the total"
    assert whole_layer(3, whole, np.linspace(-1, 1, 12)).verdict == "behaviour absent in this model"
    assert whole_layer(3, whole[:5], total[:5]).verdict == "undecided", "too few groups"
    curve = {1: whole * 0.3, 2: whole * 0.85, 4: whole * 0.75, 8: whole * 0.95}
    assert smallest(curve, whole, 0.8) == 8, "a share that is lost again with more neurons does not count"
    enough, k = sufficiency({**curve, 4: whole * 0.9}, {2: whole * 0.05}, whole, 100, 0.8)
    assert (enough.verdict, k) == ("supported", 2)
    assert sufficiency({8: whole}, {}, whole, 20, 0.8)[0].verdict == "not supported", "eight of twenty are not few"
    assert sufficiency(curve, {8: whole}, whole, 1000, 0.8)[0].verdict == "undecided", "random neurons do as much"
    assert gating("m", 2, total, {2: total * 0.1}, {}, total).verdict == "supported"
    assert gating("m", 2, total, {2: total * 0.9}, {}, total).verdict == "not supported"
    assert gating("m", 2, total * 0.01, {2: total * 0.001}, {}, total).verdict == "undecided", "there is nothing to gate"
    assert adjacency(8, np.asarray([2.0, *[1.0] * 19])).verdict == "supported"
    assert adjacency(8, np.asarray([1.0, *[1.0] * 19])).verdict == "undecided"
    assert adjacency(8, np.asarray([2.0, *[1.0] * 5])).verdict == "undecided", "six orders cannot reach 0.05"


def test_measures_of_sparsity() -> None:
    one, equal = np.eye(1, 50)[0], np.full(50, -2.0)
    assert (participation(one), participation(equal)) == pytest.approx((1, 50))
    assert (gini(one), gini(equal)) == pytest.approx((0.98, 0))
    assert np.isnan(participation(np.zeros(5)))
    assert np.isnan(gini(np.zeros(5)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"position": "each"}, "one place"),
        ({"layer": 99}, "layers 0 to 3"),
        ({"control_layer": -5}, "--control-layer -5: this model has layers 0 to 3"),
        ({"layer": 0}, "no layer before it"),
        ({"upstream": ("mlp_out:3",)}, "does not come before"),
        ({"upstream": ("neuron:1",)}, "is no module"),
        ({"windows": (64,)}, "from 2 to 16"),
        ({"draws": 0}, "out of range: whole numbers from 1"),
        ({"sufficient": 1.5}, "between 0 and 1"),
        ({"layers": 3}, "Unknown argument of jm.gate"),
    ],
)
def test_what_cannot_be_asked_is_refused(how: dict[str, Any], said: str) -> None:
    planted = _planted("gate")
    with pytest.raises(UserError, match=said):
        jm.gate(planted.model, planted.pairs, "logit-diff", form="text", **{"windows": (8,), **how})


def test_few_groups_are_refused_and_up_to_ten_are_undecided() -> None:
    planted = _planted("gate")
    pairs = [pair for pair in planted.pairs if not pair.control]
    with pytest.raises(UserError, match="are too few, give 4"):
        jm.gate(planted.model, pairs[:3], "logit-diff", form="text", windows=())
    names = list(dict.fromkeys(pair.group for pair in pairs))[:6]
    found = jm.gate(
        planted.model, [pair for pair in pairs if pair.group in names], "logit-diff", form="text", windows=(), draws=1, tokens=0
    )
    assert {one.verdict for one in found.verdicts} == {"undecided", "described"}
    assert all("too few" in one.why for one in found.verdicts if one.verdict == "undecided")


def _group(rng: np.random.Generator, neurons: int) -> Group:
    values = {side: rng.normal(size=neurons).astype(np.float32) * 3 for side in ("base", "source")}
    return Group(rng.permutation(neurons)[:5], rng.permutation(neurons)[:5], values)


def test_a_clamp_holds_at_the_last_prompt_token_and_at_every_written_one() -> None:
    model, group = tiny.model("llama"), _group(np.random.default_rng(0), tiny.model("llama").config.neurons)
    prompts = [np.arange(5, 5 + length, dtype=np.int32) for length in (4, 6)]
    edits = clamp_edits(1, group, Clamp("top", "source", "base"), [len(ids) for ids in prompts])
    written = generate_ids(model, prompts, 3, edits=edits, stops=())
    plain = generate_ids(model, prompts, 3, stops=())
    for ids, found in zip(prompts, written, strict=True):
        text = ids.tolist()
        for _ in range(3):
            late = list(range(len(ids) - 1, len(text)))
            at = [(place, unit) for place in late for unit in group.top]
            values = group.values["source"][[unit for _, unit in at]]
            held = jm.edits.resample("neuron", values, 1, [place for place, _ in at], [unit for _, unit in at])
            text.append(int(jm.forward(model, np.asarray(text), held, logits="last")[0][0, 0].argmax()))
        assert found.tolist() == text[len(ids) :]
    assert any(a.tolist() != b.tolist() for a, b in zip(written, plain, strict=True))
    assert clamp_edits(1, group, CLAMPS[0], [4]) is None


def test_perplexity_under_a_clamp_is_that_of_edited_forwards(plain_model: Model, tmp_path: Path) -> None:
    text = "a b c d e\n\nf g h\n\n" + "q" * 20
    (tmp_path / "text.txt").write_text(text)
    group = _group(np.random.default_rng(1), plain_model.config.neurons)
    edits = jm.edits.resample("neuron", group.values["base"][group.top], 1, unit=group.top)
    found = perplexity(plain_model, tmp_path / "text.txt", edits)
    losses = []
    for part in text.split("\n\n"):
        ids = text_ids(plain_model.tokenizer, part)
        scores = jax.nn.log_softmax(jm.forward(plain_model, ids, edits)[0][0], axis=-1)
        losses += [-float(scores[at, token]) for at, token in enumerate(ids[1:])]
    assert found.value == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)
    assert found.value != pytest.approx(perplexity(plain_model, tmp_path / "text.txt").value, rel=1e-3)
    with pytest.raises(UserError, match="names positions or rows"):
        perplexity(plain_model, tmp_path / "text.txt", jm.edits.zero("neuron", 1, position=2, unit=3))


def test_perplexity_under_clamps_is_measured_once(study: tuple[str, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, job, out = study
    (tmp_path / "text.txt").write_text("one two three\n\nfour\n\nfive six")
    job = replace(job, request=replace(job.request, spec=replace(job.request.spec, text=str(tmp_path / "text.txt"))))
    groups, runs = [read_group(job, out, half, 2) for half in (0, 1)], []
    monkeypatch.setattr("jaxmed.gating.clamp.perplexity", lambda *given: runs.append(given) or perplexity(*given))
    first = clamp_perplexity(job, groups, tmp_path)
    again = clamp_perplexity(job, groups, tmp_path)
    assert len(runs) == 3
    assert [(one.value, one.tokens, one.losses.tolist()) for one in first] == [
        (one.value, one.tokens, one.losses.tolist()) for one in again
    ]
    assert [given[2] is None for given in runs] == [True, False, False]


def test_answers_are_judged_once_and_compared_prompt_by_prompt(study: tuple[str, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, job, out = study
    rows = read_csv(out / "answers.csv")
    counted = int(job.counted.sum())
    assert len(rows) == len(CLAMPS) * counted
    assert all(sum(row["pair"] == pair.id for row in rows) == len(CLAMPS) for pair in job.pairs if not pair.control)
    kept = (out / "answers.csv").read_bytes()

    def never(*given: Any) -> list[float | None]:
        raise AssertionError("a finished condition was answered again")

    run_gate(job, out, resume=True, judging=Judging(never, RULES.settings))
    assert (out / "answers.csv").read_bytes() == kept
    contrasts = job.singles["neurons"].with_weights(job.model, None).contrasts
    assert [(one.base.asked, one.source.asked) for one in contrasts] == [(one.base, one.source) for one in job.pairs]  # what judges read
    with pytest.raises(UserError, match="judging"):
        run_gate(job, out, resume=True, judging=Judging(never, {"judge": "http"}))


def test_verdicts_on_answers(tmp_path: Path, study: tuple[str, Any, Path]) -> None:
    """Made-up scores: the top group turns every refusal, random ones turn none."""
    _, job, _ = study

    def write(**refused: float) -> list[Any]:
        rows = []
        for pair in (pair for pair in job.pairs if not pair.control):
            for clamp in CLAMPS:
                score = refused.get(f"{clamp.group}_{clamp.values}_{clamp.prompts}", float(clamp.prompts == "base"))
                rows.append({"half": "1", **asdict(clamp), "pair": pair.id, "score": score})
        write_csv(tmp_path / "answers.csv", rows)
        return clamp_verdicts(job, tmp_path, 2, [])

    first, second, cost = write(top_source_base=0.0, top_base_source=1.0)
    assert [(one.verdict, one.estimate) for one in (first, second)] == [("supported", -1.0), ("supported", 1.0)]
    assert (cost.verdict, cost.estimate) == ("described", 0.0)
    assert write(top_source_base=0.0, matched_source_base=0.0)[0].verdict == "undecided", "random neurons do as much"
    assert write(top_source_base=0.5, matched_source_base=0.0)[0].verdict == "not supported", "random neurons do more"
    assert write(none__base=0.0, matched_source_base=0.0)[0].verdict == "behaviour absent in this model"
