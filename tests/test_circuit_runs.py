"""Circuits end to end: known mechanisms, curves and areas, the benchmark's files, folders that go on, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.circuits.choice import random_edges, random_nodes, rewired, top_edges, top_nodes
from jaxmed.circuits.curve import FRACTIONS, areas
from jaxmed.circuits.formats import Scored, read_scores, write_scores
from jaxmed.circuits.graph import Graph, graph_of
from jaxmed.circuits.job import make_circuits
from jaxmed.circuits.kept import is_kept, recall
from jaxmed.circuits.spec import CircuitSpec
from jaxmed.cli.flags import SourceFlags
from jaxmed.cli.main import main
from jaxmed.files import read_csv
from jaxmed.models.model import Model
from jaxmed.prompts import PromptPair
from tests import tiny
from tests.naive_circuits import Naive, names_of
from tests.tolerances import EFFECTS

PAIRS = (
    PromptPair("one", "how to harm", "how to help", ("S",), ("N",), split="discovery"),
    PromptPair("two", "how to harm it", "how to heal it", ("S",), ("N",), split="heldout"),
)
SMALL = Graph(2, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, and a file of pairs."""
    folder = tmp_path_factory.mktemp("circuits")
    tiny.tokenizer().save_pretrained(tiny.write_checkpoint(folder / "model"))
    names = ("id", "base", "source", "target", "foil", "split")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({name: getattr(pair, name) for name in names}) for pair in PAIRS))
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["circuit", "--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl"), "--outcome", "logit-diff"]
    return [*given, "--out", str(out), "--edges", "30", "--random", "1", *more]


@pytest.fixture(scope="module")
def ran(folder: Path) -> Path:
    """The folder of a finished run."""
    assert main(command(folder, folder / "run", "--method", "eap")) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("name", "heads", "path"),
    [
        ("path", ("first head", "second head"), "input->{0}<v> {0}->m1 m1->{1}<v> {1}->logits"),
        ("copy", ("copier",), "input->{0}<v> {0}->logits"),
    ],
)
def test_the_best_edges_are_those_of_a_planted_mechanism(name: str, heads: tuple[str, ...], path: str) -> None:
    planted = jm.planted(name)
    pairs = [pair for pair in planted.pairs if not pair.control][:2]
    units = {unit.name: f"a{unit.layer}.h{unit.index}" for unit in planted.units}
    wanted = path.format(*(units[head] for head in heads)).split()
    found = jm.circuit(planted.model, pairs, "logit-diff", "text", method=("eap", "eap-ig"), edges=len(wanted), random=0)
    for method in ("eap", "eap-ig"):
        chosen = found.in_circuit.sel(scored_by=method)
        places = np.argwhere(chosen.values)
        assert {f"{found.sender.values[u]}->{found.receiver.values[v]}" for u, v in places} == set(wanted)
    every = jm.circuits.graph_of(planted.model.config).real
    assert np.isfinite(found.score.sel(scored_by="eap").values[every]).all()


def test_a_planted_path_carries_the_behaviour_only_with_the_key_that_it_needs() -> None:
    """The first head looks at the alarm word: without base's key it does not, whatever the values on its way are."""
    planted = jm.planted("path")
    pair = next(pair for pair in planted.pairs if not pair.control)
    graph = jm.circuits.graph_of(planted.model.config)
    heads = [f"a{unit.layer}.h{unit.index}" for unit in planted.units if unit.mediator == "head_out"]
    path = [f"input->{heads[0]}<v>", f"{heads[0]}->m1", f"m1->{heads[1]}<v>", f"{heads[1]}->logits"]
    masks = np.stack([graph.marked(edges) for edges in (graph.edges, [], path, [*path, f"input->{heads[0]}<k>"])])
    every, none, without, whole = jm.circuits.outcomes(planted.model, [pair], masks, "logit-diff", "text")[:, 0]
    assert abs((without - none) / (every - none)) < 0.1
    assert (whole - none) / (every - none) == pytest.approx(1, abs=0.1)


def test_scores_of_a_file_are_what_the_benchmark_has(ran: Path, folder: Path) -> None:
    """Its clean run is base, its corrupted one source, and its loss minus the difference of clean's and corrupted's answer: whichever of
    target and foil is base's, a file has the same numbers, mean over pairs."""
    model = jm.load(folder / "model")
    graph, held = graph_of(model.config), json.loads((ran / "scores-eap.json").read_text())
    turned = [replace(pair, target=pair.foil, foil=pair.target) for pair in PAIRS]
    jm.circuit(model, turned, "logit-diff", method="eap", edges=30, random=1, out=folder / "turned")
    other = json.loads((folder / "turned" / "scores-eap.json").read_text())
    assert set(held) == {"cfg", "nodes", "edges"}
    assert held["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16}
    assert list(held["nodes"]) == list(graph.nodes)
    job = make_circuits(model, PAIRS, CircuitSpec(), "logit-diff")
    totals, expected = [], dict.fromkeys(held["edges"], 0.0)
    for contrast in job.contrasts:
        (target,), (foil,) = contrast.answers.ids
        naive = Naive(model, contrast.base.ids, contrast.source.ids, target, foil)
        totals.append(naive.outcome("source") - naive.outcome("base"))
        for edge, score in naive.scores([1.0]).items():
            expected[edge] += score / len(PAIRS)
    loss = np.sign(np.mean(totals))  # where the outcome is higher in source, it is the loss of clean's answer
    for edge, entry in held["edges"].items():
        assert entry["score"] == pytest.approx(loss * expected[edge], abs=EFFECTS)
        assert entry == {"score": pytest.approx(other["edges"][edge]["score"], abs=EFFECTS), "in_graph": other["edges"][edge]["in_graph"]}
    assert [entry["in_graph"] for entry in held["edges"].values()].count(True) <= 30
    for name, entry in held["nodes"].items():
        if name != "logits":
            own = sum(score["score"] for edge, score in held["edges"].items() if edge.startswith(f"{name}->"))
            assert entry["score"] == pytest.approx(own, abs=EFFECTS)


def test_the_tables_agree_with_loops_over_nodes(ran: Path, folder: Path) -> None:
    """Faithfulness of the marked circuit, and areas of the curve as the benchmark takes them."""
    model = jm.load(folder / "model")
    edges = {row["edge"] for row in read_csv(ran / "edges.csv")}
    job, outcomes = make_circuits(model, PAIRS, CircuitSpec(), "logit-diff"), []
    for contrast in job.contrasts:
        (target,), (foil,) = contrast.answers.ids
        naive = Naive(model, contrast.base.ids, contrast.source.ids, target, foil)
        outcomes.append([naive.circuit(edges), naive.outcome("base"), naive.outcome("source")])
    circuit, base, source = np.mean(outcomes, axis=0)
    rows = {(row["method"], row["rank"]): row for row in read_csv(ran / "circuits.csv", ("method", "rank"))}
    marked = rows["eap", "absolute"]
    assert marked["outcome"] == pytest.approx(circuit, abs=EFFECTS)
    assert marked["faithfulness"] == pytest.approx((circuit - source) / (base - source), abs=1e-3)
    curve = [row for row in read_csv(ran / "curve.csv", ("method", "rank")) if (row["method"], row["rank"]) == ("eap", "absolute")]
    line = [row["faithfulness"] for row in curve] + [1.0]
    assert [row["count"] for row in curve] == [int(fraction * 262) for fraction in FRACTIONS[:-1]]
    steps = [(FRACTIONS[at + 1] - FRACTIONS[at]) * (line[at] + line[at + 1]) / 2 for at in range(len(line) - 1)]
    assert marked["cpr"] == pytest.approx(sum(steps))
    assert {row["method"] for row in read_csv(ran / "curve.csv")} == {"all edges", "no edges", "eap", "random", "rewired"}


def test_a_run_goes_on_and_refuses_another_request(ran: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (ran / "curve.csv").read_bytes()
    assert json.loads((ran / "run.json").read_text())["identity"] < EFFECTS
    (ran / "kept" / "circuits-1.npz").write_bytes(b"torn")
    assert main(command(folder, ran, "--method", "eap", "--resume")) == 2  # names what is damaged, and drops it
    assert "circuits-1.npz is damaged" in capsys.readouterr().err
    assert main(command(folder, ran, "--method", "eap", "--resume")) == 0
    assert (ran / "curve.csv").read_bytes() == before
    assert json.loads((ran / "run.json").read_text())["sessions"][-1]["circuits"] == 1 + 1 + 9 * 4 + 1 + 2
    assert main(command(folder, ran, "--method", "eap-ig", "--resume")) == 2
    assert "another request" in capsys.readouterr().err
    assert main(["report", str(ran), "--out", str(folder / "again.html")]) == 0
    assert "Faithfulness" in (folder / "again.html").read_text()


@pytest.mark.parametrize("harm", ["cut", "bit of a number", "flags of the archive", "another pair's"])
def test_what_is_kept_and_damaged_is_not_used(ran: Path, tmp_path: Path, harm: str) -> None:
    kept = ran / "kept" / "scores-0.npz"
    content, at = (
        kept.read_bytes(),
        {"bit of a number": len(kept.read_bytes()) // 2, "flags of the archive": kept.read_bytes().index(b"PK\1\2") + 8}.get(harm, 0),
    )
    flipped = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
    harmed = {"cut": content[:-9], "another pair's": (ran / "kept" / "scores-1.npz").read_bytes()}.get(harm, flipped)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "scores-0.npz").write_bytes(harmed)
    assert recall(tmp_path, "scores-0") is None
    assert not is_kept(tmp_path, "scores-0")
    assert recall(ran, "scores-0") is not None


def test_other_scores_of_nodes_are_another_request(plain_model: Model) -> None:
    graph = graph_of(plain_model.config)
    blank = np.full(graph.real.shape, np.nan)
    jobs = [
        make_circuits(plain_model, PAIRS, CircuitSpec(nodes=2), "logit-diff", given=Scored(graph, blank, nodes, np.zeros_like(graph.real)))
        for nodes in (np.arange(len(graph.senders)) + 1.0, np.arange(len(graph.senders)) + 2.0)
    ]
    assert jobs[0].manifest()["scores"] != jobs[1].manifest()["scores"]


def test_scores_from_a_file_give_the_same_curve(ran: Path, folder: Path) -> None:
    assert main(command(folder, folder / "read", "--scores", str(ran / "scores-eap.json"))) == 0
    first, second = (read_csv(one / "curve.csv", ("method", "rank")) for one in (ran, folder / "read"))
    renamed = [{**row, "method": row["method"].replace("eap", "file")} for row in first]
    assert [row["count"] for row in renamed] == [row["count"] for row in second]
    assert [row["outcome"] for row in second] == pytest.approx([row["outcome"] for row in renamed], abs=EFFECTS)
    held = json.loads((ran / "scores-eap.json").read_text())
    held["edges"] = {edge: {"in_graph": entry["in_graph"]} for edge, entry in held["edges"].items()}
    (folder / "circuit.json").write_text(json.dumps(held))
    found = jm.circuit(jm.load(folder / "model"), PAIRS, "logit-diff", scores=folder / "circuit.json", out=folder / "alone", random=1)
    alone, before = (read_csv(one / "circuits.csv", ("method", "rank")) for one in (folder / "alone", ran))
    marked = next(row for row in before if (row["method"], row["rank"]) == ("eap", "absolute"))
    assert (alone[0]["outcome"], alone[0]["connected"]) == (pytest.approx(marked["outcome"], abs=EFFECTS), marked["connected"])
    assert "score" not in found
    assert np.isnan(found.cpr.sel(curve="file absolute"))


def test_pairs_that_score_and_pairs_that_measure_are_kept_apart(folder: Path) -> None:
    """And circuits of nodes: all nodes are all edges."""
    model = jm.load(folder / "model")
    apart = jm.circuit(model, PAIRS, "logit-diff", method="eap", nodes=16, random=1, apart=True)
    first = jm.circuit(model, PAIRS[:1], "logit-diff", method="eap", nodes=16, random=1)
    second = jm.circuit(model, PAIRS[1:], "logit-diff", method="eap", nodes=16, random=1)
    np.testing.assert_allclose(np.abs(apart.node_score.values), np.abs(first.node_score.values), atol=1e-6)
    assert (apart.attrs["outcome_base"], apart.attrs["outcome_source"]) == (second.attrs["outcome_base"], second.attrs["outcome_source"])
    assert bool(apart.in_circuit.values[0][graph_of(model.config).real].all())


def test_areas_of_known_curves() -> None:
    at = np.asarray(FRACTIONS)
    assert areas(np.ones(10)).cpr == pytest.approx(0.999)
    assert areas(np.ones(10)).cmd == 0
    straight = areas(at)
    assert (straight.cpr, straight.cmd) == pytest.approx(((1 - 1e-6) / 2, 0.999 - (1 - 1e-6) / 2))
    assert areas(2 - at).cmd == pytest.approx(straight.cmd)


def test_the_best_edges_and_nodes_by_both_ranks() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=SMALL.real.shape)
    at = tuple(SMALL.places.T)
    for rank, values in (("signed", scores), ("absolute", np.abs(scores))):
        chosen = top_edges(SMALL, scores, 5, rank)
        assert set(values[chosen]) == set(sorted(values[at])[-5:])
    nodes = np.asarray([3.0, 0.1, -2.0, 0.2, 0.0, 0.0, 1.0])
    kept = names_of(SMALL, top_nodes(SMALL, nodes, 2))
    heads = {f"input->a0.h1<{letter}>" for letter in "qkv"}
    assert kept == heads | {"input->logits", "a0.h1->logits"}
    assert names_of(SMALL, top_nodes(SMALL, nodes, 2, "signed")) == {
        *(f"input->{name}" for name in ("m1", "logits")),
        "m1->logits",
    }


def test_random_circuits_have_the_sizes_they_are_compared_at() -> None:
    chosen = random_edges(SMALL, 12, np.random.default_rng(1))
    assert (chosen.sum(), (chosen & ~SMALL.real).sum()) == (12, 0)
    other = rewired(SMALL, chosen, np.random.default_rng(2))
    assert (other.sum(0) == chosen.sum(0)).all()
    assert not (other == chosen).all()
    assert not (other & ~SMALL.real).any()
    assert random_nodes(SMALL, 7, np.random.default_rng(0)).sum() == len(SMALL.places)


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    edges = np.where(SMALL.real, rng.normal(size=SMALL.real.shape), np.nan)
    edges[0, 0] = np.nan  # an edge without a score
    whole = Scored(SMALL, edges, rng.normal(size=7), SMALL.real)
    write_scores(tmp_path / "scores.json", whole)
    back = read_scores(tmp_path / "scores.json")
    np.testing.assert_array_equal(back.edges, whole.edges)
    np.testing.assert_array_equal(back.nodes, whole.nodes)
    np.testing.assert_array_equal(back.chosen, whole.chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": {"n_layers": 2}}, "n_heads None, d_model None; n_layers, n_heads and d_model are whole numbers"),
        ({"cfg": {**SMALL.config, "n_layers": 2.5}}, "n_layers 2.5; "),
        ({"cfg": {**SMALL.config, "n_heads": math.inf}}, "n_heads inf; "),
        ({"cfg": {**SMALL.config, "n_layers": 2_000_000}}, "circuits are found among 134,217,728 at most"),
        ({"cfg": {**SMALL.config, "parallel_attn_mlp": True}}, "parallel_attn_mlp"),
        ({"edges": {"m1->a0.h0<q>": {"score": 1.0, "in_graph": True}}}, "there is none of that name"),
        ({"edges": {"input->m0": {"score": "high", "in_graph": True}}}, "needs a finite number 'score'"),
        ({"edges": {"input->m0": {"score": math.nan}}}, "needs a finite number 'score'"),
        ({"edges": {"input->m0": {"score": 10**400}}}, "needs a finite number 'score'"),
        ({"nodes": []}, "needs the keys 'cfg', 'nodes' and 'edges'"),
    ],
)
def test_files_that_are_no_scores_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "scores.json").write_text(json.dumps({"cfg": SMALL.config, "nodes": {}, "edges": {}, **change}))
    with pytest.raises(jm.UserError, match=message):
        read_scores(tmp_path / "scores.json")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pairs": [replace(PAIRS[0], source="how to be of help")]}, "tokens in base"),
        ({"pairs": [replace(PAIRS[0], control="neutral")]}, "control pairs do not count"),
        ({"outcome": "kl"}, "gradient, and that of 'kl'"),
        ({"contrast": "model"}, "two prompts in one model"),
        ({"method": "exact"}, "eap"),
        ({"edges": 263}, "more than this model has: 262"),
        ({"apart": True, "pairs": PAIRS[:1]}, "both splits"),
        ({"scores": Scored(SMALL, np.zeros(SMALL.real.shape), np.zeros(7), SMALL.real)}, "scores are of a model with"),
        ({"points": 0}, "--points"),
        ({"chunk": 3}, "argument of jm.circuit"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(plain_model: Model, how: dict[str, Any], message: str) -> None:
    with pytest.raises(jm.UserError, match=message):
        jm.circuit(plain_model, **{"pairs": PAIRS, "outcome": "logit-diff", **how})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume", "--outcome", "log-odds"], "holds a run of another request"),
        (["--resume", "--prefill", "Well, "], "holds a run of another request"),
        (["--source-model", "x"], "`jaxmed circuit` has no flag --source-model"),
        (["--contrast", "model"], "--contrast: 'model' is not one of"),
        (["--scores", "SCORES"], "scores are of a model with"),
    ],
)
def test_what_the_command_cannot_do_is_said_before_weights_are_loaded(
    ran: Path,
    folder: Path,
    tmp_path: Path,
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(SourceFlags, "load", lambda self: pytest.fail("weights were loaded"))
    (tmp_path / "other.json").write_text(json.dumps({"cfg": {**SMALL.config, "n_layers": 90}, "nodes": {}, "edges": {}}))
    given = [str(tmp_path / "other.json") if one == "SCORES" else one for one in flags]
    out = ran if "--resume" in flags else tmp_path / "out"
    assert main(command(folder, out, "--method", "eap", *given)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_run_that_goes_on_is_of_what_is_left(
    ran: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half"
    shutil.copytree(ran, out)
    (out / "kept" / "scores-1.npz").unlink()
    for place, passes in ((ran, 0), (out, 4)):
        capsys.readouterr()
        assert main(command(folder, place, "--method", "eap", "--resume", "--dry-run")) == 0
        said = capsys.readouterr().out
        assert (f"in all: {passes} passes" in said) == bool(passes), said
        assert (" passes" in said) == bool(passes)


def test_circuits_of_another_graph_are_refused(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="no edge 'm1->m0'"):
        SMALL.marked(["m1->m0"])
    with pytest.raises(jm.UserError, match=r"this model's are bool \[circuit, 16, 40\]"):
        jm.circuits.outcomes(plain_model, PAIRS, SMALL.real[None], "logit-diff")
