"""The bridge between mediation and pruning: masks at a planted gate are found there, random ones are not, others' are refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import jaxmed as jm
from jaxmed.bridge.conditions import AT, ELSEWHERE, MEDIATORS, part_at
from jaxmed.bridge.mediators import single_effects, strongest
from jaxmed.bridge.owners import owned_matrices
from jaxmed.bridge.spec import BridgeSpec
from jaxmed.bridge.tally import STRATA, strata, tally
from jaxmed.cli.main import main
from jaxmed.errors import UserError
from jaxmed.files import simple
from jaxmed.models.named_weights import matrix_shapes, weights_by_name
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.masks import Mask, write_mask
from jaxmed.pruning.selection import random_like
from jaxmed.studies.mediation import make_mediation, run_mediation
from jaxmed.studies.mediation_spec import MediationSpec
from tests import pruning_sets, reference, tiny, tolerances
from tests.processes import end_at, finish

MASKS = 100
"""Random masks."""


@cache
def _planted(seed: int = 0) -> Any:
    return jm.planted("gate", seed=seed)


@cache
def _table() -> xr.Dataset:
    planted = _planted()
    return jm.sweep(planted.model, planted.pairs[:16], "logit-diff", ("neuron", "head_out"), form="text")


def _gate(planted: Any) -> list[int]:
    return [unit.index for unit in planted.units if unit.kind == "gate"]


def _mask_of(model: Any, layer: int, neurons: list[int]) -> Mask:
    """All weights of some neurons of a Llama, by the names and shapes of its checkpoint."""
    shapes = matrix_shapes(model.config)
    found = {name: np.zeros(0, np.int64) for name in shapes}
    for name, (rows, columns) in shapes.items():
        flat = np.arange(rows * columns).reshape(rows, columns)
        if name.startswith(f"model.layers.{layer}.mlp.down_proj"):
            found[name] = np.sort(flat[:, neurons].ravel())
        elif name.startswith(f"model.layers.{layer}.mlp."):
            found[name] = np.sort(flat[neurons].ravel())
    return Mask(found, shapes, model.name, model.identity)


def _random(model: Any, seed: int, part: float = 0.02) -> Mask:
    shapes, rng = matrix_shapes(model.config), np.random.default_rng(seed)
    drawn = {name: np.sort(rng.choice(math.prod(s), int(part * math.prod(s)), replace=False)) for name, s in shapes.items()}
    return Mask(drawn, shapes, model.name, model.identity)


def _row(found: Any, scope: str, mask: str = "behaviour") -> dict[str, Any]:
    return next(row for row in found.rows if (row["scope"], row["mask"]) == (scope, mask))


def test_a_mask_at_the_planted_gate_is_far_more_often_there_than_chance() -> None:
    planted = _planted()
    mask = _mask_of(planted.model, 3, _gate(planted))
    found = jm.enrichment(planted.model, _table(), mask, {"other": random_like(mask, 7)}, top=3)
    row = _row(found, "neurons of layer 3")
    assert row["at_mediators"] == row["removed"] == mask.count
    assert row["ratio_by_counts"] == pytest.approx(32 / 3)
    assert row["ratio_by_norms"] > 4, "the planted weights are large, and yet"
    assert row["p"] < 0.005
    assert row["more_than_controls"] > 3
    assert row["p_more"] < 0.005
    assert _row(found, "neurons of layer 3", "random of like size")["p"] > 0.01
    correlation = next(one for one in found.correlations if (one["unit"], one["layer"]) == ("neuron", 3))
    assert correlation["removed_rho"] > 0.4
    assert not _row(found, "neurons of layer 1")["removed"]


def test_random_masks_are_rejected_no_more_often_than_the_level_and_their_intervals_hold_one() -> None:
    planted, p, held = _planted(), [], []
    for seed in range(MASKS):
        found = jm.enrichment(planted.model, _table(), _random(planted.model, seed), permutations=200, seed=seed)
        p += [(scope, _row(found, scope)["p"]) for scope in ("neurons of layer 3", "all neurons", "heads")]
        row = _row(found, "all neurons")
        assert row["mediating"] == 16
        held.append(row["norms_low"] <= 1 <= row["norms_high"])
    most = stats.binom.ppf(0.999, MASKS, 0.05)
    for scope in dict.fromkeys(name for name, _ in p):
        mine = np.asarray([value for name, value in p if name == scope])
        assert (mine <= 0.05).sum() <= most, scope
        assert 0.3 < mine.mean() < 0.8, "neither always small nor always one"
    assert np.sum(held) >= stats.binom.ppf(0.001, MASKS, 0.95)


def test_counts_are_those_of_a_slow_count() -> None:
    """Row by row and column by column, with the heads of a group sharing its keys and values."""
    model = _planted().model
    config, masks = model.config, [_random(model, 1, 0.03), _random(model, 2, 0.01)]
    found = tally(config, weights_by_name(model), masks, {"neuron": (1, 3), "head_out": (0, 2)})
    weights = {name: np.abs(values) for name, values in weights_by_name(model).items()}
    width, group = config.head_width, config.heads // config.kv_heads
    for one in found:
        for unit in range(len(one.norm)):
            removed, by_counts, by_norms, squares, sizes = 0.0, 0.0, 0.0, 0.0, 0.0
            kinds = ("gate_proj", "up_proj", "down_proj") if one.kind == "neuron" else ("q_proj", "k_proj", "v_proj", "o_proj")
            for kind in kinds:
                name = next(n for n in weights if n.startswith(f"model.layers.{one.layer}.") and kind in n)
                values, part, at = weights[name], 1.0, unit
                if kind in ("k_proj", "v_proj"):
                    at, part = unit // group, 1 / group
                mine = np.zeros(values.shape, bool)
                size = 1 if one.kind == "neuron" else width
                where = slice(at * size, (at + 1) * size)
                mine[(slice(None), where) if kind in ("down_proj", "o_proj") else where] = True
                marked = np.zeros(values.size, bool)
                marked[masks[0].indices[name]] = True
                marked = marked.reshape(values.shape)
                removed += part * (marked & mine).sum()
                by_counts += part * marked.sum() * mine.sum() / values.size
                stratum = _slow_strata(values)
                for number in range(STRATA):
                    here = stratum == number
                    by_norms += part * (marked & here).sum() * (mine & here).sum() / max(here.sum(), 1)
                squares, sizes = squares + part * (values[mine] ** 2).sum(), sizes + part * mine.sum()
            assert one.removed[0, unit] == pytest.approx(removed)
            assert one.by_counts[unit] == pytest.approx(by_counts)
            assert one.by_norms[0, unit] == pytest.approx(by_norms)
            assert one.norm[unit] == pytest.approx(math.sqrt(squares / sizes), rel=1e-5)
        assert one.removed[1].sum() == pytest.approx(one.removed[0].sum()), "scaled to the counts of the first"


def _slow_strata(values: np.ndarray) -> np.ndarray:
    """Halves: how many of the edges (median, upper quartile, ...) a value reaches."""
    ordered, count = np.sort(values.ravel()), values.size
    edges = [ordered[count - (count >> power)] for power in range(1, STRATA) if count >> power]
    return np.sum([values >= edge for edge in edges], axis=0)


def test_strata_halve_and_keep_equal_values_together() -> None:
    found = strata(np.arange(4096, dtype=np.float32))
    assert np.bincount(found).tolist()[:3] == [2048, 1024, 512]
    assert len(set(strata(np.ones(64, np.float32)).tolist())) == 1
    assert strata(np.ones(1, np.float32)).tolist() == [0]


@pytest.mark.parametrize("name", ["llama3.1", "gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_without_its_output_weights_a_unit_adds_nothing(name: str, tmp_path: Path) -> None:
    """The layout of families: pruning what a unit writes by is clamping it at zero."""
    model, _ = pruning_sets.loaded(name, tmp_path)
    tokens, shapes = reference.tokens(9), matrix_shapes(model.config)
    for kind, path, unit in (("neuron", "down", 5), ("head_out", "out", 2)):
        found = {matrix: np.zeros(0, np.int64) for matrix in shapes}
        for owned in owned_matrices(model.config, {kind: (2,)}):
            if owned.path == path:
                found[owned.name] = np.flatnonzero(owned.owner == unit).astype(np.int64)
        pruned = apply_mask(model, Mask(found, shapes, model.name, model.identity))
        wanted = jm.forward(model, tokens, jm.edits.zero(kind, layer=2, unit=unit))[0]
        np.testing.assert_allclose(jm.forward(pruned, tokens)[0], wanted, atol=tolerances.TINY_LOGITS)
        assert np.abs(np.asarray(wanted) - np.asarray(jm.forward(model, tokens)[0])).max() > 1e-4


def test_a_mask_falls_into_its_part_at_the_mediators_and_the_rest() -> None:
    model = _planted().model
    mask, units = _random(model, 3), {("neuron", 3): np.asarray([4, 9]), ("head_out", 1): np.asarray([1])}
    inside, outside = part_at(model.config, mask, units), part_at(model.config, mask, units, inside=False)
    for name, at in mask.indices.items():
        np.testing.assert_array_equal(np.union1d(inside.indices[name], outside.indices[name]), at)
        assert not len(np.intersect1d(inside.indices[name], outside.indices[name]))
    every = _mask_of(model, 3, [4, 9])
    for name in (name for name in every.indices if ".3.mlp." in name):
        np.testing.assert_array_equal(inside.indices[name], np.intersect1d(mask.indices[name], every.indices[name]))
    assert not any(len(inside.indices[name]) for name in mask.indices if ".2." in name)


def test_mediating_units_are_few_and_the_strongest() -> None:
    effects = {("neuron", 3): np.arange(32.0), ("head_out", 0): np.asarray([0.0, 5, 1, 0]), ("head_out", 1): np.asarray([3.0, 0, 0, 9])}
    chosen = strongest(effects, 3)
    assert set(chosen["neuron", 3]) == {31, 30, 29}
    assert (chosen["head_out", 0].tolist(), chosen["head_out", 1].tolist()) == ([], [3]), "an eighth of eight heads"
    assert len(strongest(effects, 100)["neuron", 3]) == 4
    planted = _planted()
    found = single_effects(_table())
    assert set(strongest(found, 3)["neuron", 3]) == set(_gate(planted))
    assert found["neuron", 3][_gate(planted)[0]] > 0


def test_masks_of_other_weights_and_tables_without_units_are_refused() -> None:
    planted, mask = _planted(), _random(_planted(seed=1).model, 0)
    with pytest.raises(UserError, match="other weights"):
        jm.enrichment(planted.model, _table(), mask)
    own = _random(planted.model, 0)
    with pytest.raises(UserError, match="other weights"):
        jm.enrichment(planted.model, _table(), own, {"control": mask})
    with pytest.raises(UserError, match="another model"):
        jm.enrichment(tiny.model("llama"), _table(), own)
    with pytest.raises(UserError, match="single neurons or heads"):
        jm.enrichment(planted.model, _table().drop_vars(["neuron", "head_out"]), own)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A study of a planted model from the command line, but for --out; --prune is there."""
    planted, folder = _planted(), tmp_path_factory.mktemp("planted")
    jm.export_folder(planted.model, folder / "model")
    for name, kept in (("pairs", False), ("controls", True)):
        rows = [
            {key: getattr(pair, key) for key in ("id", "base", "source", "target", "foil", "category", "group")}
            for pair in planted.pairs
            if bool(pair.control) == kept
        ][:24]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, prompt, response in (("no", "base", "no"), ("yes", "source", "yes"), ("kept", "source", "no")):
        texts = dict.fromkeys(getattr(pair, prompt) for pair in planted.pairs)
        rows = [{"prompt": text, "response": response, "split": _split(text)} for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model": folder / "model", "pairs": folder / "pairs.jsonl", "controls": folder / "controls.jsonl", "form": "text"}
    flags |= {"outcome": "logit-diff", "read-at": "-2", "windows": 8, "draws": 1, "tokens": 2, "text": ""}
    flags |= {"prune": folder / "no.jsonl", "prune-controls": folder / "yes.jsonl", "preserve": folder / "kept.jsonl"}
    flags |= {"prune-form": "space", "q": 0.01, "p": 0.01, "score-limit": 8, "test-limit": 4, "prune-pairs": 24}
    return ["study", "mediation", *(str(part) for flag, value in flags.items() for part in (f"--{flag}", value))]


def _split(text: str) -> str:
    return "train" if zlib.crc32(text.encode()) % 2 else "heldout"


def _given(command: list[str], **changed: Any) -> list[str]:
    """The command with other values of some flags."""
    found = list(command)
    for flag, value in changed.items():
        found[found.index(f"--{flag.replace('_', '-')}") + 1] = str(value)
    return found


def test_the_command_plans_the_bridge_and_refuses_what_it_cannot_use(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = ["--out", str(tmp_path / "run")], tmp_path / "other.safetensors"
    write_mask(_random(_planted(seed=1).model, 0), other)
    assert main([*command, *out, "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "bridge:" in line]
    assert "passes" in line
    for flags, said in (
        ({"prune": other}, "other weights"),
        ({"prune_controls": other}, "other weights"),
        ({"prune": "nowhere"}, "nowhere"),
        ({"prune": tmp_path / "none.safetensors"}, "no mask file"),
        ({"prune_controls": command[command.index("--prune") + 1]}, "comes twice"),
        ({"q": 2}, "q (2.0)"),
        ({"prune_pairs": 0}, "--prune-pairs 0"),
    ):
        assert main([*_given(command, **flags), *out]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_bridge_in_the_folder_is_refused_before_the_study_runs(tmp_path: Path) -> None:
    planted, mask = _planted(), tmp_path / "own.safetensors"
    write_mask(_random(planted.model, 0), mask)
    texts = dict.fromkeys(pair.source for pair in planted.pairs)
    rows = [{"prompt": text, "response": "no", "split": _split(text)} for text in texts]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = make_mediation(planted.model, planted.pairs[:16], [], MediationSpec(read_at="-2", windows=(), tokens=0), "logit-diff", "text")
    spec = BridgeSpec(prune=str(mask), prune_controls=(), preserve=str(tmp_path / "kept.jsonl"), prune_form="space")
    job, held = job.with_bridge(spec), tmp_path / "run" / "bridge"
    assert job.bridge is not None
    held.mkdir(parents=True)
    (held / "run.json").write_text(json.dumps({"manifest": simple({**job.bridge.manifest(), "examples": "others"}), "sessions": []}))
    with pytest.raises(UserError, match=r"(?s)another request.*examples"):
        run_mediation(job, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "reading").exists()


def _read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was run without a bridge."""
    out, at = tmp_path_factory.mktemp("finished") / "run", command.index("--prune")
    assert main([*command[:at], "--out", str(out)]) == 0
    assert not (out / "bridge").exists()
    return out


@pytest.fixture(scope="module")
def bridged(command: list[str], finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that went on with a bridge."""
    out = tmp_path_factory.mktemp("bridged") / "run"
    shutil.copytree(finished, out)
    assert main([*command, "--out", str(out), "--resume"]) == 0
    return out


def _swept(out: Path) -> dict[str, int]:
    """Files of effects outside the bridge, and when they were written."""
    names = ("neuron", "attention_out", "mlp_out", "joint")
    found = [path for name in names for path in out.glob(f"**/{name}/c/**/*") if path.is_file() and "bridge" not in path.parts]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in found}


@pytest.mark.slow
def test_a_finished_study_goes_on_with_a_bridge(finished: Path, bridged: Path) -> None:
    assert _swept(bridged) == _swept(finished) != {}, "nothing but the bridge is swept"
    claims = {row["claim"]: row for row in _read(bridged / "verdicts.csv")}
    assert any("the mediating neurons do less after pruning for no" in claim for claim in claims)
    assert claims["without the weights of the mediating neurons of layer 3 alone, the total is smaller"]["verdict"] == "supported"
    assert "Do removed weights sit at the units that mediate" in (bridged / "report.html").read_text(encoding="utf-8")
    pruned = {row["mask"]: row for row in _read(bridged / "bridge" / "pruned.csv")}
    parts = [int(pruned[f"no, {where}"]["weights"]) for where in (AT, ELSEWHERE)]
    assert sum(parts) == int(pruned["no"]["weights"]) > min(parts)
    assert abs(float(pruned[MEDIATORS]["part"])) < 0.02, "the whole gate is gone"


@pytest.mark.slow
def test_effects_after_pruning_are_those_of_full_forwards(command: list[str], bridged: Path) -> None:
    """What is written of the pruned model, against patches of one pair at a time."""
    model = jm.load(command[command.index("--model") + 1])
    mask = jm.pruning.select(jm.pruning.read_scores(bridged / "bridge" / "scores-no"), jm.pruning.Rule(q=0.01, p=0.01), tag="attack")
    pruned, table = apply_mask(model, mask), jm.open_results(bridged / "bridge" / "after").load()
    identity = json.loads((bridged / "bridge" / "after" / "run.json").read_text())["manifest"]["model"]["weights"]
    assert identity == pruned.identity != model.identity
    pair = jm.read_pairs(command[command.index("--pairs") + 1])[0]
    for name, units in ((str(one), json.loads(str(table.set_units.sel(set=one).values))["units"]) for one in table.set.values):
        wanted = jm.patch(pruned, pair, units, "logit-diff", "last", form="text")
        assert float(table.joint.sel(set=name)[0]) == pytest.approx(wanted.effect, abs=1e-4)
        assert float((table.source_outcome - table.base_outcome)[0]) == pytest.approx(wanted.total, abs=1e-4)


@pytest.mark.slow
def test_a_killed_bridge_is_resumed_to_the_same_tables(command: list[str], finished: Path, bridged: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    run = [*command, "--out", str(out), "--resume"]
    end_at(run, ((signal.SIGKILL, out / "bridge" / "scores-no"), (signal.SIGTERM, out / "bridge" / "after")))
    finish(run)
    for name in ("verdicts.csv", "enrichment.csv", "correlations.csv", "units.csv", "effects.csv", "pruned.csv", "pruned-pairs.csv"):
        assert (out / "bridge" / name).read_bytes() == (bridged / "bridge" / name).read_bytes(), name


def test_scores_are_summed_where_the_mask_is() -> None:
    planted = _planted()
    rows = [jm.Example(pair.base, pair.foil[0]) for pair in planted.pairs[:6]]
    scores = jm.pruning.score(planted.model, rows, rows, form="space")
    mask = jm.pruning.select(scores, jm.pruning.Rule(q=0.01, p=0.0))
    found = jm.enrichment(planted.model, _table(), mask, scores=scores)
    total = sum(np.abs(scores.read("behaviour_signed", name).ravel()[at]).sum() for name, at in mask.indices.items())
    assert sum(row["score"] for row in found.units) == pytest.approx(total, rel=1e-5)
    assert sum(row["removed_behaviour"] for row in found.units) == pytest.approx(mask.count)
