"""Agreement of estimates with exact effects, from saved runs: against scipy, on a page, and refused where runs are not alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.files import read_csv
from jaxmed.models.model import Model
from jaxmed.reports.agreement import AGREEMENT, MISSES, PAGE
from tests import tiny

UNITS = ("neuron", "mlp_out")


def _run(model: Model, folder: Path, method: str, **how: Any) -> Path:
    jm.sweep(model, tiny.PAIRS[1:], unit=UNITS, method=method, out=folder, **how)
    return folder


def test_numbers_equal_those_of_scipy_and_a_page_is_drawn(plain_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [_run(plain_model, tmp_path / method, method, position="each") for method in ("exact", "attribution")]
    out = tmp_path / "out"
    assert main(["agreement", "--exact", str(folders[0]), "--estimate", str(folders[1]), "--out", str(out)]) == 0
    assert "mlp_out" in capsys.readouterr().out
    exact, estimate = (jm.open_results(folder).neuron for folder in folders)
    rows = {(row["unit"], row["layer"], row["position"]): row for row in read_csv(out / AGREEMENT)}
    for layer, position, at in (("all", "all", {}), ("1", "all", {"layer": 1}), ("all", "-2", {"position": -2})):
        found = rows["neuron", layer, position]
        own: list[Any] = [[one.isel(pair=pair).sel(at).values.ravel() for one in (estimate, exact)] for pair in range(2)]
        own = [[x[np.isfinite(y)], y[np.isfinite(y)]] for x, y in own]
        assert float(found["spearman"]) == pytest.approx(float(np.mean([np.asarray(spearmanr(x, y))[0] for x, y in own])), rel=1e-5)
        assert float(found["pearson"]) == pytest.approx(float(np.mean([np.asarray(pearsonr(x, y))[0] for x, y in own])), rel=1e-5)
        first = [len({*np.argsort(-abs(x))[:10]} & {*np.argsort(-abs(y))[:10]}) / 10 for x, y in own]
        assert float(found["recall10"]) == pytest.approx(np.mean(first))
    misses = read_csv(out / MISSES)
    wrong = [abs(float(row["difference"])) for row in misses if row["unit"] == "neuron"]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[0] == pytest.approx(float(np.nanmax(np.abs(estimate.values - exact.values))), rel=1e-5)
    assert {row["reason"] for row in misses} <= {"overshoot", "undershoot", "opposite", "in part"}
    assert "Worst misses" in (out / PAGE).read_text()
    assert main(["agreement", "--exact", str(folders[0]), "--estimate", str(folders[1]), "--out", str(out)]) == 2


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (("attribution", {}), ("attribution", {}), "--method exact"),
        (("exact", {}), ("exact", {}), "--method exact"),
        (("exact", {}), ("attribution", {"outcome": "logprob"}), "differ in outcomes"),
        (("exact", {}), ("attribution", {"position": "user_last"}), "differ in position"),
        (
            ("exact", {"patch": "scale", "patch_factor": 3.0}),
            ("attribution", {"patch": "scale", "patch_factor": 0.5}),
            "differ in patch_factor",
        ),
        (("exact", {"patch": "noise", "seed": 1}), ("attribution", {"patch": "noise", "seed": 2}), "differ in seed"),
    ],
)
def test_runs_that_are_not_alike_are_refused(plain_model: Model, tmp_path: Path, first: Any, second: Any, said: str, capsys: Any) -> None:
    folders = [_run(plain_model, tmp_path / name, method, **how) for name, (method, how) in (("a", first), ("b", second))]
    assert main(["agreement", "--exact", str(folders[0]), "--estimate", str(folders[1]), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
