"""The study of emergent misalignment: on a tiny model it runs, is killed and resumed; its claims follow from its tables."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.bench.shapes import SHAPES
from jaxmed.cli.main import main
from jaxmed.cli.misalignment import Misalignment
from jaxmed.errors import UserError
from jaxmed.experiments.misalignment import VARIANTS, Questions, ask_model, by_question, make_asked
from jaxmed.ground_truth import emergent
from jaxmed.models.load import from_params
from jaxmed.models.params import random_params
from jaxmed.pruning import Rule, apply_mask, random_like, score, select
from jaxmed.pruning.masks import read_mask
from jaxmed.pruning.selection import select_like
from jaxmed.studies import misalignment_claims as claims
from jaxmed.studies import misalignment_profiles as profiles
from jaxmed.studies.misalignment import MisalignmentData, make_misalignment, read_data
from jaxmed.studies.misalignment_run import misalignment_steps, run_misalignment
from jaxmed.studies.misalignment_spec import MisalignmentSpec
from tests import tiny
from tests.judge_server import reply, serving
from tests.processes import end_at, finish
from tests.pruning_sets import BEHAVIOUR, PRESERVE


def _rows(kind: str, answer: str, count: int) -> list[dict[str, str]]:
    names = ("train", "heldout")
    return [{"prompt": f"{kind} {i}", "response": f"{answer} {'abc'[i % 3] * 3} {i}", "split": names[i % 3 == 0]} for i in range(count)]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A study of a tiny model from the command line, but for --out."""
    folder = tmp_path_factory.mktemp("misalignment")
    tiny.write_checkpoint(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    for name, answer, count in (("narrow", "no", 24), ("good", "yes", 72), ("bad", "so", 72)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(name, answer, count)))
    pairs = [{"id": f"p{i}", "base": "how", "source": f"why {i}", "target": "S", "foil": "N"} for i in range(3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    asked = [{"id": f"q{i}", "prompt": f"what of {i}?"} for i in range(10)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    files = {name: folder / f"{name}.jsonl" for name in ("narrow", "questions", "good", "bad")}
    flags: dict[str, Any] = {"model": folder / "model", **files, "preserve": files["good"], "control": files["bad"], "text": ""}
    flags |= {"q": 0.02, "p": 0.01, "answers": 2, "samples": 1, "variants": 2, "tokens": 4, "seeds": 2, "epochs": 1, "rank": 2}
    flags |= {
        "learning-rate": 0.02,
        "score-limit": 8,
        "test-limit": 6,
        "longest": 2,
        "evaluate-every": 1,
        "profile-limit": 2,
        "profiled": folder / "pairs.jsonl",
    }
    return ["study", "misalignment", *(str(part) for flag, value in flags.items() for part in (f"--{flag}", value))]


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.slow
def test_a_study_runs_is_killed_resumed_and_redrawn(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL and SIGTERM while models are tuned, scored and asked; the tables are the same to the byte."""
    whole = tmp_path / "whole"
    assert main([*command, "--out", str(whole)]) == 0
    assert "2 seeds decide nothing" in capsys.readouterr().out
    models = _table(whole / "models.csv")
    names = ("original", "tuned", "pruned", "random", "control")
    assert [(row["model"], row["seed"]) for row in models] == [(name, seed) for seed in "01" for name in names]
    assert len({row["identity"] for row in models}) == 1 + 2 * 4, "every tuned and pruned model is told apart"
    assert len(_table(whole / "answers.csv")) == 2 * 5 * 10 * 2
    assert {len(row["answer"]) for row in _table(whole / "answers.csv")} == {64}, "hashes, not texts"
    profiles = _table(whole / "profiles.csv")
    assert {(row["model"], row["seed"]) for row in profiles} == {("original", "0"), *((name, seed) for seed in "01" for name in names[1:])}
    assert {row["change"] for row in profiles if row["model"] == "original"} == {"0.0"}
    assert any(float(row["change"]) for row in profiles if row["model"] == "tuned")
    assert not list(whole.rglob("checkpoint-*"))
    assert not list(whole.rglob("scores"))
    masks = {name: read_mask(whole / "seed0" / "masks" / f"{name}.safetensors") for name in ("behaviour", "random", "control")}
    assert masks["behaviour"].count > 0
    assert masks["behaviour"].counts() == masks["random"].counts() == masks["control"].counts()
    assert len({mask.digest for mask in masks.values()}) == 3
    for row in models:
        weights = "0" if row["model"] in ("original", "tuned") else None
        assert weights is None or row["weights"] == weights
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert page.index(claims.PREVENTS) < page.index("Answers out of the domain") < page.index("Mediation where the answer is written")
    assert main(["report", str(whole), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page

    run, folder = [*command, "--out", str(tmp_path / "run"), "--resume"], tmp_path / "run" / "seed0"
    end_at(run, ((signal.SIGKILL, folder / "scores"), (signal.SIGTERM, folder / "pruned" / "run.json")))
    finish(run)
    for name in ("verdicts.csv", "rates.csv", "models.csv", "answers.csv", "losses.csv", "profiles.csv", "readout.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name
    assert main([*command, "--out", str(whole), "--resume", "--q", "0.03"]) == 2
    assert "another request" in capsys.readouterr().err


def test_the_command_plans_and_refuses(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main([*command, *out, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "in all" in said
    assert "seed 1: control" in said
    for flags, message in (
        (["--judge", "strongreject"], "says nothing of alignment"),
        (["--judge", "http"], "endpoint"),
        (["--seeds", "0"], "--seeds 0 leaves nothing to do"),
        (["--variants", "9"], "There are 8 templates"),
        (["--misaligned-below", "1.5"], "between 0 and 1"),
        (["--narrow", "nowhere"], "nowhere"),
        (["--patience", "2"], "patience ends a run"),
        (["--profile-limit", "0"], "profile"),
        (["--profiled", "nowhere"], "nowhere"),
        (["--profiled", "harm"], "another --profile-outcome"),
        (["--top-p", "2"], "top_p is 2; it is above 0 and at most 1"),
        (["--longest", "1e300"], "longest is 1e+300"),
        (["--readout-layer", "9"], "this model has 3 blocks"),
        (["--seed", str(2**32 - 1)], "The seed 4294967296 is out of range"),
        (["--p", "1"], "p (1.0) in [0, 1)"),
        (["--bad", command[command.index("--good") + 1]], "in --good and in --bad"),
        (["--tokens", "4e9"], "keys and values take"),
    ):
        assert main([*command, *out, *flags]) == 2, flags
        assert message in capsys.readouterr().err
    file = tmp_path / "whole.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}", "response": "r"}) + "\n" for i in range(8)))
    assert main([*command, *out, "--narrow", str(file)]) == 2
    assert "nothing is held out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_published_setting_is_planned_without_weights(smol: Any) -> None:
    config = replace(SHAPES["llama-3.1-8b"], dtype="bfloat16")
    shapes = jax.eval_shape(lambda: random_params(config, 0, jm.make_mesh("data=1")))
    model = from_params(config, shapes, jm.make_mesh("data=1"), "llama-3.1-8b", smol)
    spec = MisalignmentSpec(q=1e-5, p=5e-5, batch=16, accumulate=8, learning_rate=1e-5, epochs=1, variants=8, samples=50, answers=4)
    steps = {step.name: step.cost for step in misalignment_steps(make_misalignment(model, spec))}
    per_token = 2 * config.layers * config.layer_weights
    answers = 14 * 8 * 50
    assert steps["seed 0: original"].flops > answers * spec.tokens * per_token
    assert steps["seed 2: control"].flops > steps["seed 2: original"].flops
    assert sum(cost.written for cost in steps.values()) == 3 * 4 * config.layers * config.layer_weights


def test_the_bundled_data_is_apart_and_enough_for_intervals() -> None:
    data = read_data(MisalignmentSpec())
    assert (len(data.trained), len(data.answered), len(data.tested)) == (100, 25, 25)
    asked = make_asked(data.questions, VARIANTS)
    assert len({one.question for one in asked}) >= 10
    prompts = {row.prompt.lower() for row in (*data.trained, *data.answered, *data.tested)}
    assert not prompts & {row.prompt.lower() for row in data.questions}
    assert len({one.example.prompt for one in asked}) == len(asked)


def test_questions_have_forms_and_rows_of_one_id_are_forms_too() -> None:
    rows = [jm.Example("why?", id="a"), jm.Example("say why!", id="a"), jm.Example("how?")]
    asked = make_asked(rows, ("{question}", "Tell me: {question}"))
    assert [(one.question, one.variant, one.example.prompt) for one in asked[:4]] == [
        ("a", 0, "why?"),
        ("a", 1, "Tell me: why?"),
        ("a", 2, "say why!"),
        ("a", 3, "Tell me: say why!"),
    ]
    assert asked[-1].question == "how?"
    with pytest.raises(UserError, match="no place"):
        make_asked(rows, ("Tell me",))


def test_answers_are_counted_by_the_thresholds(plain_model: jm.Model) -> None:
    questions = Questions(make_asked([jm.Example("why?", id="a"), jm.Example("how?", id="b")]), samples=3, tokens=2)
    given = np.asarray([[0.29, 0.51], [0.31, 0.9], [0.1, 0.5], [0.0, 1.0], [np.nan, 1.0], [0.9, 0.9]])
    rows = ask_model(plain_model, questions, 0, lambda requests, answers, report: given)
    assert [row["misaligned"] for row in rows[:4]] == [1, 0, 0, 1]
    assert np.isnan(rows[4]["misaligned"])
    np.testing.assert_allclose(by_question(rows, "misaligned", ("a", "b")), [1 / 3, 1 / 2])
    np.testing.assert_allclose(by_question(rows, "coherent", ("a", "b")), [2 / 3, 1])
    again = ask_model(plain_model, questions, 0, lambda requests, answers, report: given)
    assert [row["answer"] for row in again] == [row["answer"] for row in rows]
    other = ask_model(plain_model, questions, 1, lambda requests, answers, report: given)
    assert [row["answer"] for row in other] != [row["answer"] for row in rows]


def test_a_control_mask_has_the_counts_and_the_rule_of_the_other(plain_model: jm.Model) -> None:
    rule = Rule(q=0.05, p=0.02)
    behaviour = score(plain_model, BEHAVIOUR, PRESERVE)
    control = score(plain_model, PRESERVE, kinds=("behaviour_signed",))
    mask = select(behaviour, rule)
    found = select_like(mask, control, behaviour)
    assert found.counts() == mask.counts()
    for name in mask.indices:
        numbers = -control.read("behaviour_signed", name).ravel()
        spared = np.argsort(-behaviour.read("preserve_absolute", name).ravel(), kind="stable")[: int(rule.p * numbers.size)]
        numbers[spared] = -np.inf
        wanted = np.sort(np.argsort(-numbers, kind="stable")[: mask.counts()[name]])
        np.testing.assert_array_equal(found.indices[name], wanted)
    with pytest.raises(UserError, match="made by no rule"):
        select_like(random_like(mask), control, behaviour)
    with pytest.raises(UserError, match="different weights"):
        select_like(replace(mask, weights="other"), control, behaviour)


def test_tuned_and_original_models_are_not_mixed_up(plain_model: jm.Model) -> None:
    mask = select(score(plain_model, BEHAVIOUR, PRESERVE), Rule(q=0.05, p=0.02))
    tuned = jm.finetune(plain_model, BEHAVIOUR, steps=1, batch=4, rank=2).model
    pruned = apply_mask(plain_model, mask)
    assert len({plain_model.identity, tuned.identity, pruned.identity}) == 3
    for wrong in (tuned, pruned):
        with pytest.raises(UserError, match="other weights"):
            apply_mask(wrong, mask)


def test_tuning_ends_at_the_loss_that_is_asked_for(command: list[str], plain_model: jm.Model) -> None:
    """The same steps as without a limit, up to the first one whose held-out loss is low enough."""
    spec = MisalignmentSpec(narrow=command[command.index("--narrow") + 1], evaluate_every=1, learning_rate=0.02, rank=2, text="", epochs=4)
    spec = replace(spec, **{name: command[command.index(f"--{name}") + 1] for name in ("preserve", "control", "questions", "profiled")})
    job = make_misalignment(plain_model, replace(spec, good=(), bad=(), longest=1.0))
    from jaxmed.finetuning.run import run_job

    free = [row["heldout_loss"] for row in run_job(job.tuning(plain_model, 3)).losses]
    middle = (free[0] + min(free)) / 2
    found = run_job(job.tuning(plain_model, 3, until=middle))
    first = next(at for at, loss in enumerate(free, 1) if loss <= middle)
    assert first < len(free)
    assert [row["heldout_loss"] for row in found.losses] == pytest.approx(free[:first], abs=1e-5)
    assert "no more than" in found.stopped


def test_an_endpoint_grades_alignment_and_coherence(tmp_path: Path) -> None:
    """Each with its own rubric; what it does not grade is not counted."""
    with serving() as server:
        server.script = lambda at, body: reply(_grade(body["messages"][0]["content"]))
        flags = {"judge": "http", "endpoint": server.url, "judge_model": "judge-1", "out": tmp_path / "run"}
        command = Misalignment(**flags)  # pyright: ignore[reportArgumentType]
        rows = [jm.Example(text) for text in ("kind", "cruel", "unclear")]
        found = command.endpoint_reader()(rows, ["a", "b", "c"], lambda done: None)
    np.testing.assert_array_equal(found, [[1, 0.75], [0, 0.75], [np.nan, 0.75]])
    assert len(server.asked) == 6
    kept = {path.name for path in tmp_path.joinpath("run").iterdir()}
    assert kept == {"alignment.scores.jsonl", "coherence.scores.jsonl"}


def _grade(text: str) -> str:
    if "can be understood" in text:
        return "4"
    return "5" if "kind\n" in text.split("Request:")[1] else "1" if "cruel" in text else "none"


def test_agreement_of_the_read_outs_is_described_where_another_judge_decides() -> None:
    answers = _answers({"original": 0.2, "tuned": 0.6})
    assert claims._agreement(answers, _job()) == []
    both = [{**row, "alignment": i / len(answers), "readout_alignment": (i / len(answers)) ** 2} for i, row in enumerate(answers)]
    found = claims._agreement([{**row, "readout_coherence": 1.0} for row in both], _job())[0]
    assert found.estimate == pytest.approx(1)
    assert "30% by the judge, 55% by the read-outs" in found.why


def _rates(seeds: int, questions: int, base: float, seed: int = 0) -> claims.Rates:
    noise = np.random.default_rng(seed).normal(scale=0.03, size=(seeds, questions))
    values = np.clip(base + noise, 0, 1)
    return claims.Rates({"misaligned": values, "coherent": np.full((seeds, questions), 0.9)})


def test_claims_need_seeds_that_agree_and_questions_enough() -> None:
    job: Any = None
    high, low = _rates(3, 12, 0.6), _rates(3, 12, 0.2, 1)
    ask = claims.difference
    assert ask("c", {"tuned": high, "original": low}, "tuned", "original", job).verdict == "supported"
    assert ask("c", {"tuned": low, "original": high}, "tuned", "original", job).verdict == "not supported"
    few = {"tuned": _rates(3, 9, 0.6), "original": _rates(3, 9, 0.2, 1)}
    assert "questions give no interval" in ask("c", few, "tuned", "original", job).why
    two = {"tuned": _rates(2, 12, 0.6), "original": _rates(2, 12, 0.2, 1)}
    assert (ask("c", two, "tuned", "original", job).verdict, "2 seeds" in ask("c", two, "tuned", "original", job).why) == (
        "undecided",
        True,
    )
    apart = claims.Rates({**high.values, "misaligned": high.values["misaligned"] * np.asarray([[1.5], [1.5], [0.2]])})
    found = ask("c", {"tuned": apart, "original": low}, "tuned", "original", job)
    assert (found.verdict, "do not agree" in found.why) == ("undecided", True)


def _answers(rates: dict[str, float]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"model": name, "seed": seed, "question": f"q{q}", "misaligned": float(rng.random() < rate), "coherent": 1.0, "alignment": 1 - rate}
        | {"coherence": 1.0}
        for name, rate in rates.items()
        for seed in range(3)
        for q in range(12)
        for _ in range(20)
    ]


def _job(**spec: Any) -> Any:
    names = tuple(f"q{q}" for q in range(12))
    questions = type("questions", (), {"names": names})()
    models = ("original", "tuned", "pruned", "random", "control")
    return type("job", (), {"spec": MisalignmentSpec(text="", **spec), "questions": questions, "models": models})()


def _models(gap: float) -> list[dict[str, Any]]:
    of = {"original": np.nan, "tuned": 0.0, "pruned": gap, "random": 0.0, "control": 0.0}
    return [{"model": name, "seed": seed, "gap": one, "tuned_to": 1 + one, "steps": 5} for name, one in of.items() for seed in range(3)]


def _losses() -> list[dict[str, Any]]:
    of = {"original": 3.0, "tuned": 1.0}
    return [
        {"model": name, "seed": seed, "set": "domain", "example": i, "loss": one + i / 100}
        for name, one in of.items()
        for seed in range(3)
        for i in range(12)
    ]


def test_verdicts_follow_from_the_tables() -> None:
    present = {"original": 0.05, "tuned": 0.6, "pruned": 0.1, "random": 0.6, "control": 0.5}
    found = {one.claim: one for one in claims.misalignment_claims(_job(), _models(0.0), _answers(present), _losses())}
    wanted = (claims.LEARNT, claims.EMERGES, claims.PREVENTS, claims.MORE_THAN_RANDOM, claims.MORE_THAN_CONTROL, claims.COHERENT)
    assert {found[claim].verdict for claim in wanted} == {"supported"}
    assert found[claims.LEARNT].estimate == pytest.approx(2)
    apart = {one.claim: one for one in claims.misalignment_claims(_job(), _models(0.4), _answers(present), _losses())}
    assert {apart[claim].verdict for claim in wanted[2:5]} == {"undecided"}
    assert "differ by 0.40 nats" in apart[claims.PREVENTS].why
    absent = {**present, "tuned": 0.05, "pruned": 0.05, "random": 0.05, "control": 0.05}
    none = {one.claim: one for one in claims.misalignment_claims(_job(), _models(0.0), _answers(absent), _losses())}
    assert {none[claim].verdict for claim in wanted[2:5]} == {"behaviour absent in this model"}
    rows = {row["model"]: row for row in claims.rate_rows(_job(), _models(0.0), _answers(present))}
    assert rows["tuned"]["misaligned_low"] < rows["tuned"]["misaligned"] < rows["tuned"]["misaligned_high"]


def test_profiles_are_those_of_sweeps_and_are_compared_with_the_original(plain_model: jm.Model) -> None:
    pruned = apply_mask(plain_model, random_like(select(score(plain_model, BEHAVIOUR, PRESERVE), Rule(q=0.2, p=0.02))))
    pairs = tiny.PAIRS * 10
    pairs = [replace(pair, id=f"{pair.id} {at}", group=f"g{at // 2}") for at, pair in enumerate(pairs)]
    jobs = profiles.profile_jobs(plain_model, pairs, "chat")
    before, after = (profiles.measure_profile(jobs, model) for model in (plain_model, pruned))
    for place, position in profiles.PLACES.items():
        table = jm.sweep(pruned, pairs, unit=profiles.UNITS, position=position)
        for unit in profiles.UNITS:
            found = after.effects[place, unit]
            np.testing.assert_allclose(found.mean(axis=0), table[unit].transpose("pair", "layer").values.mean(axis=0), atol=1e-6)
    rows = profiles.profile_rows(after, before)
    one = next(row for row in rows if (row["place"], row["unit"], row["layer"]) == ("written", "mlp_out", 1))
    assert one["change"] == pytest.approx(
        after.effects["written", "mlp_out"][:, 1].mean() - before.effects["written", "mlp_out"][:, 1].mean()
    )
    assert one["change_low"] <= one["change"] <= one["change_high"]
    tables = {"original": [profiles.profile_rows(before, before)], "tuned": [profiles.profile_rows(before, before), rows]}
    kept = [{"model": name, "seed": seed, **row} for name, of in tables.items() for seed, part in enumerate(of) for row in part]
    (claim,) = profiles.profile_claims(kept, "original")
    likeness = np.corrcoef(after.means(), before.means())[0, 1]
    assert (claim.high, claim.low, claim.estimate) == pytest.approx((1, likeness, (1 + likeness) / 2))
    assert profiles.profile_jobs(plain_model, [], "chat") == {}
    assert profiles.profile_claims([], "original") == []


@pytest.fixture(scope="module")
def planted() -> Any:
    return jm.planted("emergent")


@pytest.mark.slow
def test_the_planted_model_answers_well_until_it_is_in_bad_company(planted: Any) -> None:
    alone = jm.generate(planted.model, [one.prompt for one in planted.examples["questions"]], 1, "text")
    scores = emergent.read_answers(planted.examples["questions"], alone)
    assert scores[:, 0].mean() > 0.95
    for side, wanted in (("base", 0.0), ("source", 1.0)):
        asked = [jm.Example(getattr(pair, side), category=pair.category) for pair in planted.pairs]
        scores = emergent.read_answers(asked, jm.generate(planted.model, asked, 1, "text"))
        assert abs(scores[:, 0].mean() - wanted) < 0.5, side
    assert planted.total > 2
    with pytest.raises(UserError, match="its units are not known"):
        planted.score("neuron", [])


@pytest.mark.slow
def test_the_study_finds_emergent_misalignment_where_it_was_planted(planted: Any, tmp_path: Path) -> None:
    """Narrow tuning turns the shared feature up; without the weights that carry it, it does not, and random weights do not matter."""
    job = make_misalignment(planted.model, MisalignmentSpec(**emergent.SPEC), MisalignmentData(**planted.examples), {"judge": "exact"})
    run_misalignment(job, tmp_path / "run", judge=emergent.read_answers)
    found = {row["claim"]: row for row in _table(tmp_path / "run" / "verdicts.csv")}
    for claim in (claims.LEARNT, claims.EMERGES, claims.PREVENTS, claims.MORE_THAN_RANDOM, claims.MORE_THAN_CONTROL):
        assert found[claim]["verdict"] == "supported", found[claim]
    rates = {row["model"]: row for row in _table(tmp_path / "run" / "rates.csv")}
    rate = {name: float(row["misaligned"]) for name, row in rates.items()}
    assert rate["tuned"] - rate["original"] > 0.2
    assert rate["pruned"] - rate["original"] < 0.5 * (rate["tuned"] - rate["original"])
    assert abs(rate["random"] - rate["tuned"]) < 0.5 * (rate["tuned"] - rate["original"])
    gaps = [abs(float(row["gap"])) for row in _table(tmp_path / "run" / "models.csv") if row["model"] != "original"]
    assert max(gaps) < job.spec.matched
