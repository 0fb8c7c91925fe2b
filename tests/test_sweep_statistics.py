"""Statistics of whole sweeps: block by block from the disk, margins of null pairs, stability of rankings, replication."""

from __future__ import annotations

import csv
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import jaxmed as jm
from jaxmed import results, statistics
from jaxmed.cli.sweep import show_stability
from jaxmed.effects import summary, unit_blocks
from jaxmed.files import write_json
from jaxmed.models.model import Model
from jaxmed.reports.page import write_report
from jaxmed.statistics.intervals import resample_weights
from jaxmed.statistics.stability import RESAMPLES

FIELDS = ("mean", "low", "high", "t", "p", "p_adjusted", "q", "p_margin")


@dataclass(frozen=True)
class Cut:
    """Blocks of an array between some places."""

    x: np.ndarray
    at: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        for begin, end in zip((0, *self.at), (*self.at, self.x.shape[1]), strict=True):
            yield slice(begin, end), self.x[:, begin:end]


def _labels(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups and splits of pairs."""
    return np.arange(pairs).astype(str), np.asarray(["discovery", "heldout"])[np.arange(pairs) % 2]


@pytest.mark.parametrize("pairs", [3, 7, 14])
def test_blocks_of_any_size_give_the_same_statistics(pairs: int) -> None:
    x = np.random.default_rng(pairs).standard_t(4, (pairs, 900)).astype(np.float32)
    x[:, :9] += 1
    x[1, 5], x[2, 400] = np.nan, np.inf
    whole = statistics.summarise(x, *_labels(pairs), margin=0.2)
    cut = statistics.summarise(Cut(x, (2, 400, 407, 801)), *_labels(pairs), margin=0.2)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(whole, name), getattr(cut, name), rtol=1e-12, err_msg=name)
    assert whole.stability == cut.stability
    assert whole.replication == cut.replication


def test_a_margin_of_nothing_is_the_test_without_one() -> None:
    x = np.random.default_rng(0).normal(0.4, 1, (9, 60))
    found = statistics.summarise(x, _labels(9)[0], margin=0.0)
    assert found.p_margin is not None
    assert np.allclose(found.p_margin, found.p_adjusted)
    assert statistics.summarise(x, _labels(9)[0]).p_margin is None


def test_only_means_beyond_the_margin_are_found() -> None:
    x = np.random.default_rng(0).normal(0, 0.1, (20, 300))
    x[:, 0] += 0.5
    x[:, 1] -= 2
    x[:, 2] += 2
    found = statistics.summarise(x, _labels(20)[0], margin=1.0)
    assert found.p_margin is not None
    assert np.flatnonzero(found.p_margin < 0.05).tolist() == [1, 2]
    assert found.p_adjusted[0] < 0.05
    assert found.p_margin[0] == 1


def test_the_margin_is_a_quantile_over_units_of_null_means() -> None:
    x = np.random.default_rng(0).normal(size=(6, 5000))
    x[:, 17] = 50  # one unit that reacts to wording
    groups = np.asarray(["a", "a", "b", "b", "c", "c"])
    sizes = np.abs(statistics.group_means(x, groups)[0].mean(axis=0))
    assert statistics.null_margin(x, groups, 40) == pytest.approx(np.quantile(sizes, 0.999))
    assert statistics.null_margin(x, groups, 3) == pytest.approx(np.quantile(sizes, 0.999))
    assert statistics.null_margin(x, groups, 2) == pytest.approx(np.quantile(sizes, 0.999) * 1.5**0.5)
    assert statistics.null_margin(x, groups, 40) < 5
    assert np.isnan(statistics.null_margin(np.full((2, 3), np.nan), groups[:2], 5))


@pytest.mark.parametrize("groups", [4, 12])
def test_stability_is_the_overlap_of_tops_by_the_book(groups: int) -> None:
    x = np.random.default_rng(groups).normal(size=(groups, 130))
    x[:, :8] += 2
    found = statistics.summarise(x, _labels(groups)[0]).stability
    by_t = statistics.ranked_by(statistics.smallest_p(groups)) == "|t|"

    def first(rows: np.ndarray, k: int) -> set[int]:
        size = np.abs(statistics.studentised(rows)) if by_t else np.abs(rows.mean(axis=0))
        return set(np.argsort(-size, kind="stable")[:k].tolist())

    weights = [row for row in resample_weights(groups, RESAMPLES, 0) if (row > 0).sum() > 1]
    for k in statistics.TOP:
        overlaps = [len(first(x, k) & top) / len(first(x, k) | top) for row in weights for top in [first(np.repeat(x, row, axis=0), k)]]
        assert found[k] == pytest.approx(np.mean(overlaps), abs=2e-3)
    assert set(statistics.summarise(x[:, :40], _labels(groups)[0]).stability) == {10}
    assert not statistics.summarise(x[:, :10], _labels(groups)[0]).stability


def test_replication_asks_for_the_same_sign() -> None:
    groups, splits = _labels(24)
    x = np.random.default_rng(0).normal(size=(24, 1000))
    x[:, :5] += 4
    x[:, 5] += np.where(splits == "discovery", 4, -4)
    found = statistics.summarise(x, groups, splits)
    assert found.replication == statistics.Replication(statistics.DISCOVERIES, 5)
    assert found.q[5] < 0.05
    assert statistics.summarise(x, groups).replication is None


def _fake(folder: Path, pairs: int, layers: int, width: int) -> None:
    """A finished sweep of made-up numbers."""
    names, dims = [f"pair {number}" for number in range(pairs)], ("pair", "layer", "neuron_index")
    groups = [f"group {number % 16}" for number in range(pairs)]
    coordinates = {"pair": names, "group": ("pair", groups), "layer": np.arange(layers), "neuron_index": np.arange(width)}
    coordinates |= {name: ("pair", [""] * pairs) for name in ("category", "split", "control")}
    variable = results.Variable
    told = {"unit": "neuron", "coordinate": "neuron_index"}
    ends = [variable(name, ("pair",)) for name in ("base_outcome", "source_outcome")]
    ends += [variable(name, ("pair", "layer")) for name in ("base_lowest", "base_highest")]
    folder.mkdir()
    variables = [variable("neuron", dims, attributes=told), *ends, variable("done", ("pair", "layer"), "uint8")]
    results.create(folder, variables, coordinates, {"outcome": "log-odds", "position": "last"})
    table, rng = results.Table(folder), np.random.default_rng(0)
    for pair in range(pairs):
        table.write([("neuron", {"pair": pair}, rng.standard_normal((layers, width), np.float32))])
        table.write([(one.name, {"pair": pair}, np.full(layers if "layer" in one.dims else (), 1, np.float32)) for one in ends])
        table.write([("done", {"pair": pair}, np.ones(layers, np.uint8))])
    write_json(folder / "run.json", {"status": "finished", "manifest": {}, "sessions": [{}]})


def _peak(folder: Path, pairs: int) -> int:
    """Bytes that the statistics of a table of 12,000 units hold at most."""
    _fake(folder, pairs, 2, 6000)
    tracemalloc.start()
    summary.summarise(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_blocks, "VALUES", 96 * 1000)
    few, many = _peak(tmp_path / "few", 16), _peak(tmp_path / "many", 96)
    assert many - few < 0.5 * 4 * (96 - 16) * 12_000  # some copies of a block; the table alone would take twice that


def test_blocks_of_a_table_are_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(tmp_path / "run", 4, 3, 50)
    effects, pairs = jm.open_results(tmp_path / "run").neuron, np.asarray([3, 1])
    for most in (1 << 20, 2 * 100, 2 * 7):
        monkeypatch.setattr(unit_blocks, "VALUES", most)
        read = list(unit_blocks.UnitBlocks(effects, pairs).blocks())
        assert np.array_equal(np.concatenate([values for _, values in read], axis=1), effects.values[pairs].reshape(2, -1))
        assert all(values.size <= most for _, values in read)
        assert [block.start for block, _ in read] == [0, *(block.stop for block, _ in read)][:-1]


def _pairs(controls: int) -> list[jm.PromptPair]:
    asks = [("harm", "help"), ("a", "b"), ("bad", "fun")]
    pairs = [jm.PromptPair(f"{n}", f"{n} do {asks[n % 3][0]}", f"{n} do {asks[n % 3][1]}", ("S",), ("N",)) for n in range(8)]
    pairs = [replace(pair, split=("discovery", "heldout")[number % 2]) for number, pair in enumerate(pairs)]
    return pairs + [jm.PromptPair(f"null {n}", f"{n} do q", f"{n} do z", ("S",), ("N",), control="paraphrase") for n in range(controls)]


def test_null_pairs_give_a_margin_everywhere(plain_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = jm.sweep(plain_model, _pairs(3), unit=("neuron", "mlp_out"), out=tmp_path / "run")
    null = np.abs(table.neuron.values[8:].astype(float).mean(axis=0))
    assert table.neuron_mean.attrs["margin"] == pytest.approx([np.quantile(null, 0.999)])
    assert table.neuron_mean.attrs["null_groups"] == [3]
    expected = statistics.summarise(
        table.neuron.values[:8].reshape(8, -1), table.group.values[:8], margin=table.neuron_mean.attrs["margin"][0]
    )
    assert np.array_equal(table.neuron_p_margin.values.reshape(-1), np.asarray(expected.p_margin, np.float32))
    rows = list(csv.DictReader((tmp_path / "run" / "top.csv").read_text().splitlines()))
    assert all(0 < float(row["p_margin"]) <= 1 for row in rows)
    show_stability(tmp_path / "run")
    said, page = capsys.readouterr().out, write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    for text in ("Margin of null pairs", "First 10 kept in resamples", "Replicated in held-out groups"):
        assert text in said
        assert text in page
    assert "<th>p_margin</th>" in page


def test_without_null_pairs_there_is_no_margin(plain_model: Model, tmp_path: Path) -> None:
    table = jm.sweep(plain_model, _pairs(0), ("log-odds", "kl"), "neuron", out=tmp_path / "run")
    assert "neuron_p_margin" not in table
    assert "margin" not in table.neuron_mean.attrs
    assert len(table.neuron_mean.attrs["top10_jaccard"]) == 2
    assert "p_margin" not in (tmp_path / "run" / "top.csv").read_text().splitlines()[0]
    assert "neuron_p_margin" not in jm.sweep(plain_model, _pairs(2)[8:], unit="neuron")  # nothing but null pairs


def test_a_total_of_nothing_is_no_denominator(plain_model: Model, tmp_path: Path) -> None:
    """Base and source are the same text."""
    same = [jm.PromptPair(f"{n}", f"{n} do a", f"{n} do a", ("S",), ("N",)) for n in range(3)]
    jm.sweep(plain_model, same, unit="mlp_out", out=tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "top.csv").read_text().splitlines()))
    assert {row["share"] for row in rows} == {"nan"}
    assert "there is nothing to have a share of" in write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
