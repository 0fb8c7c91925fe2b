"""The report page: what it shows, what it warns of, and that it stands alone."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from plotly.offline import get_plotlyjs

from jaxmed import results
from jaxmed.errors import UserError, visible
from jaxmed.files import write_json
from jaxmed.reports.curves import write_loss_curve
from jaxmed.reports.maps import binned
from jaxmed.reports.page import write_report
from jaxmed.reports.record import mean_effect, read
from jaxmed.reports.style import MISSING, number, spans
from jaxmed.runs.folder import RUN

COLUMNS = ("rank", "unit", "layer", "index", "position", "outcome", "mean", "share", "ci_low", "ci_high", "p", "q")
COLUMNS += ("pairs_agreeing", "promotes", "suppresses")
INDEX = {"neuron": "neuron_index", "window": "window_index", "head_out": "head_index"}
SIZES = {"neuron_index": 6, "window_index": 3, "head_index": 2}


def build(
    folder: Path,
    units: tuple[str, ...] = ("neuron", "head_out", "attention_out", "mlp_out", "residual_out"),
    pairs: int = 12,
    layers: int = 3,
    outcomes: tuple[str, ...] = ("log-odds",),
    positions: int = 0,
    totals: Any = None,
    undone: int = 0,
    noise: float = 1e-6,
    tokens: str = "' yes' '<script>alert(1)</script>'",
    sizes: dict[str, int] = SIZES,
) -> Path:
    """A finished run (or, with the last `undone` pairs missing, a partial one) with made-up numbers and no model."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    axes = {"pair": pairs, "layer": layers, "outcome": len(outcomes), "position": positions, **sizes}
    first, last = ("outcome",) if len(outcomes) > 1 else (), ("position",) if positions else ()
    dims = {unit: (*first, "pair", "layer", *((INDEX[unit],) if unit in INDEX else ()), *last) for unit in units}
    dims |= {"base_outcome": (*first, "pair"), "source_outcome": (*first, "pair")}
    dims |= {name: (*first, "pair", "layer") for name in ("base_lowest", "base_highest")}
    coordinates: dict[str, Any] = {"pair": [f"pair-{i}" for i in range(pairs)], "layer": np.arange(layers)}
    coordinates |= {"category": ("pair", [("north", "south")[i % 2] for i in range(pairs)]), "group": ("pair", coordinates["pair"])}
    coordinates |= {"split": ("pair", [""] * pairs), "control": ("pair", [""] * pairs)}
    coordinates |= {INDEX[unit]: np.arange(sizes[INDEX[unit]]) for unit in units if unit in INDEX}
    coordinates |= {"outcome": list(outcomes)} if first else {}
    coordinates |= {"position": np.arange(-positions, 0)} if last else {}
    variables = [results.Variable(name, at) for name, at in dims.items()]
    results.create(folder, [*variables, results.Variable("done", ("pair", "layer"), "uint8")], coordinates, {})
    values = {name: rng.normal(size=[axes[dim] for dim in at]).astype("float32") for name, at in dims.items()}
    values["base_outcome"][:] = -1.0
    values["source_outcome"][:] = -1.0 + (np.ones(pairs) if totals is None else np.asarray(totals))
    values["base_lowest"][:], values["base_highest"][:] = 0.0, noise
    values["done"], dims["done"] = np.ones((pairs, layers), "uint8"), ("pair", "layer")
    for name, array in values.items():
        if undone and "pair" in dims[name]:
            array[(slice(None),) * dims[name].index("pair") + (slice(pairs - undone, None),)] = 0 if name == "done" else np.nan
    added = xr.Dataset({name: (dims[name], array) for name, array in values.items()})
    for unit in () if undone else units:
        added = added.merge(_statistics(unit, added[unit], pairs))
    results.append(folder, {str(name): ([str(dim) for dim in array.dims], array.values, array.attrs) for name, array in added.items()})
    _write_records(folder, units, outcomes, layers, positions, tokens, bool(undone))
    return folder


def _statistics(unit: str, effects: xr.DataArray, pairs: int) -> xr.Dataset:
    few = pairs < 10
    mean = effects.mean("pair")
    how = f"none: {pairs} groups are too few for an interval that holds its level (at least 10)" if few else f"95 % BCa of {pairs} groups"
    mean.attrs = {"interval": how, "smallest_p": 2.0 / 2**pairs}
    wide = xr.full_like(mean, np.nan if few else 0.2)
    fields = {"mean": mean, "ci_low": mean - wide, "ci_high": mean + wide, "p": xr.full_like(mean, 0.5), "q": xr.full_like(mean, np.nan)}
    return xr.Dataset({f"{unit}_{name}": field.astype("float32") for name, field in fields.items()})


def _write_records(folder: Path, units: Any, outcomes: Any, layers: int, positions: int, tokens: str, partial: bool) -> None:
    request = {"outcomes": list(outcomes), "units": list(units), "position": "each" if positions else "last", "window": 2}
    manifest = {"request": request, "layers": list(range(layers)), "device": "cpu", "mesh": {"data": 2}, "tokens": [{"base": [11, 22]}]}
    manifest["model"] = {"name": "toy-model", "revision": None, "weights": "abcdef0123456789", "dtype": "float32"}
    session = {"started": "2026-01-02T03:04:05+00:00", "versions": {"jax": "0.0.1"}, "seconds": 1234.5, "passes": 42, "layers": layers}
    write_json(folder / RUN, {"manifest": manifest, "sessions": [session], "status": "running" if partial else "finished"})
    if partial:
        return
    plain = {"position": "last", "outcome": outcomes[0], "share": 0.25, "ci_low": 0.1111, "ci_high": 0.9999, "p": 0.00123, "q": "nan"}
    rows = [
        {**plain, "rank": 1, "unit": unit, "layer": 2, "index": 5 if unit in INDEX else "", "mean": 0.123456, "pairs_agreeing": "11/12"}
        for unit in units
    ]
    rows[0] |= {"promotes": tokens, "suppresses": '"quoted" & \x07bell\u202e'}
    with (folder / results.TOP).open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list[Any](COLUMNS), restval="")
        writer.writeheader()
        writer.writerows(rows)


def page(folder: Path, *more: Path) -> str:
    """The page without plotly.js."""
    html = write_report([folder, *more], folder / results.REPORT).read_text(encoding="utf-8")
    packed = re.findall(r'<script type="text/plain" id="plotly">(.*?)</script>', html)
    assert [gzip.decompress(base64.b64decode(one)).decode() for one in packed] == [get_plotlyjs()]
    return html.replace(packed[0], "")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a finished run with nothing wrong."""
    return page(build(tmp_path_factory.mktemp("report") / "run"))


def warned(html: str) -> str:
    """The text of the warnings, not of the notes."""
    return " ".join(re.findall(r'<li class="warning">(.*?)</li>', html, re.S))


def plots(html: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.S)]


def test_shows_facts_and_top_units(sound: str) -> None:
    for text in ("toy-model", "abcdef012345", "float32", "2026-01-02", "12 in 12 groups, 2 categories: north, south", "1,230 s"):
        assert text in sound
    for text in ("effect(unit) = y(base; unit := its value in source)", "0.123", "25.0 %", "[0.111, 1.00]", "0.00123", "11/12"):
        assert text in sound
    assert "jaxmed report" in sound


def test_p_of_earlier_versions_is_the_adjusted_one(sound: str) -> None:
    """Their column p was adjusted over all units, and there was no other."""
    heads = re.search(r"<thead><tr>(.*?)</tr>", sound)
    cells = re.search(r"<tbody>\s*<tr>(.*?)</tr>", sound)
    assert heads
    assert cells
    row = dict(zip(re.findall(r">([^<]*)</th>", heads[1]), re.findall(r">([^<]*)</td>", cells[1]), strict=True))
    assert (row["p"], row["p_adjusted"]) == (MISSING, "0.00123")
    assert "Ranked by |mean|" in sound
    assert sound.count("<table>") == 5
    assert "[11, 22]" not in sound  # token ids stay in run.json


def test_a_sound_run_has_no_warning(sound: str) -> None:
    assert warned(sound) == ""
    assert "Noise floor: 1.00e-06 (" in sound


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"totals": [1.0] * 9 + [-1.0] * 3}, "disagree in sign: 9 pairs positive, 3 pairs negative"),
        ({"pairs": 4}, "No confidence intervals: 4 groups are too few"),
        ({"pairs": 4}, "smallest p that this number of groups can reach is 0.125"),
        ({"noise": 0.5}, "near the noise floor"),
        ({"totals": [0.0] * 12}, "The outcome is -1.00 in base and source of every pair. The mean total (0) is not above the noise floor"),
        ({"totals": [1.0, -1.0] * 6}, "there is nothing to have a share of"),
        ({"totals": [3.0, -1.0] * 6}, "The 95 % interval of the mean total, [-0.3"),
        ({"undone": 5}, "Partial run: 21 of 36 (pair, layer) chunks are done, 7 of 12 pairs in full. Means are over 7 pairs"),
    ],
)
def test_warns_where_it_applies(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    assert text in warned(page(build(tmp_path / "run", **changes)))


def test_residual_note_only_with_residual_out(sound: str, tmp_path: Path) -> None:
    assert "No claim about depth rests on it" in sound
    assert "No claim about depth rests on it" not in page(build(tmp_path / "without", units=("neuron", "mlp_out")))


def test_negative_total_explains_the_share(tmp_path: Path) -> None:
    html = page(build(tmp_path / "run", totals=[-1.0] * 12))
    assert "a positive share is an effect toward the foil" in html
    assert warned(html) == ""


def test_partial_mean_is_over_finished_pairs(tmp_path: Path) -> None:
    record = read(build(tmp_path / "run", undone=5))
    expected = record.table["mlp_out"].values[:7].mean(axis=0)
    np.testing.assert_allclose(mean_effect(record, "mlp_out", "log-odds").values, expected, rtol=1e-6)
    assert "No ranking yet" in page(record.folder)


def test_run_with_nothing_done_still_gives_a_page(tmp_path: Path) -> None:
    html = page(build(tmp_path / "run", undone=12))
    assert "There is nothing to average yet" in warned(html)
    assert plots(html) == []


def test_stands_alone(sound: str) -> None:
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//""", sound)
    assert not re.search(r"@import|url\(|<link|<iframe|<img", sound)


def test_escapes_texts(sound: str) -> None:
    assert "<script>alert" not in sound
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in sound
    assert "&#34;quoted&#34; &amp; \\x07bell\\u202e" in sound


def test_figures_of_modules_heads_and_neurons(sound: str) -> None:
    drawn = plots(sound)
    assert [plot["data"][0]["type"] for plot in drawn] == ["heatmap", "scatter", "heatmap", "scatter"]
    lines = {trace["name"]: trace for trace in drawn[1]["data"] if trace.get("name")}
    assert lines["residual_out"]["visible"] == "legendonly"
    assert lines["mlp_out"]["visible"] is True
    assert all(plot["data"][0]["zmin"] == -plot["data"][0]["zmax"] for plot in drawn if plot["data"][0]["type"] == "heatmap")


def test_positions_give_position_maps(tmp_path: Path) -> None:
    html = page(build(tmp_path / "run", units=("neuron", "attention_out"), positions=4))
    assert [plot["data"][0]["type"] for plot in plots(html)] == ["heatmap", "heatmap", "scatter"]
    assert "Sum over the 6 units of a layer" in html


def test_several_outcomes_and_several_folders(tmp_path: Path) -> None:
    two = build(tmp_path / "two", units=("window", "mlp_out"), outcomes=("log-odds", "logprob"))
    html = page(two, build(tmp_path / "one", units=("mlp_out",)))
    assert len(plots(html)) == 2 * 3 + 2
    assert "Outcome logprob" in html
    assert 'href="#run2"' in html


def test_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no effects\.zarr"):
        write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(UserError, match="nothing to report"):
        write_report([], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_page_leaves_nothing(tmp_path: Path) -> None:
    folder = build(tmp_path / "run")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_report([folder], tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]


def test_imports_no_jax() -> None:
    code = "import sys, jaxmed.reports.page; print([name for name in ('jax', 'jaxlib', 'flax', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_bins_keep_the_largest_of_their_units() -> None:
    values, index, width = binned(np.array([[1.0, -3.0, 2.0, 0.5, np.nan]]), 3)
    assert width == 2
    np.testing.assert_array_equal(values, [[-3.0, 2.0, np.nan]])
    np.testing.assert_array_equal(index, [[1, 2, 4]])


def test_numbers_and_texts() -> None:
    cases = {0.00012345: "0.000123", 12345.0: "12,300", 123.4: "123", -1.0: "-1.00", 0.0: "0", 1e-7: "1.00e-07"}
    assert {value: number(value) for value in cases} == cases
    assert number(float("nan")) == number("") == "\u2013"
    assert spans([0, 1, 2, 9]) == "0-2, 9"
    assert visible("a\x00\ud800b\nc") == "a\\x00\\ud800b\nc"


MOST_BYTES = 3_000_000
LARGE = {"neuron_index": 8192, "window_index": 256, "head_index": 32}
PAGES: dict[str, dict[str, Any]] = {
    "one outcome": {},
    "two outcomes": {"outcomes": ("log-odds", "kl")},
    "every position": {"positions": 40, "sizes": SIZES, "units": ("head_out", "mlp_out")},
}


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_has_three_megabytes_at_most(tmp_path: Path, kind: str) -> None:
    folder = build(tmp_path / "run", **{"sizes": LARGE, "layers": 28, "pairs": 3, **PAGES[kind]})
    assert write_report([folder], tmp_path / "page.html").stat().st_size < MOST_BYTES


def test_figures_of_experiments_are_small_too(tmp_path: Path) -> None:
    (tmp_path / "losses.csv").write_text("step,loss,heldout_loss\n" + "".join(f"{step},{1 / step},\n" for step in range(1, 2000)))
    assert write_loss_curve(tmp_path / "losses.csv", tmp_path / "losses.html").stat().st_size < MOST_BYTES


def test_dots_say_interval_and_promoted_tokens(sound: str) -> None:
    notes = [note for plot in plots(sound) for trace in plot["data"] for note in trace.get("hovertext") or () if "neuron" in note]
    assert notes
    assert all(re.search(r"95 %: -?[\d.]+ to -?[\d.]+", note) for note in notes)
    assert any("promotes" in note and "&lt;script" in note for note in notes)
