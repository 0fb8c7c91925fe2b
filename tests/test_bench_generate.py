"""What generation is measured against, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxmed.bench.generate import THEIRS, measure_generate, token_cost
from jaxmed.cli.main import main
from jaxmed.models.load import load
from jaxmed.models.params import MATRICES
from jaxmed.models.transformer import head
from tests import tiny


@pytest.mark.slow
def test_transformers_writes_the_same_texts_and_the_row_says_so(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "m")
    tiny.tokenizer().save_pretrained(folder)
    found = measure_generate(load(str(folder)), (1, 3), 5, 1, tmp_path / "B.md")
    assert [one["same texts"] for one in found] == [1, 3]
    assert all(one["ratios"][THEIRS] > 0 for one in found)
    written = (tmp_path / "B.md").read_text()
    assert "5 new tokens" in written
    assert "3 of 3 texts are the same" in written


@pytest.mark.parametrize("name", ["llama", "post_norm", "windowed_biased"])
def test_flops_and_bytes_are_those_of_all_matrices(name: str) -> None:
    model = tiny.model(name)
    flops, read = token_cost(model.config, 4)
    matrices = [model.params["blocks"][name] for name in MATRICES]
    assert read == sum(matrix.nbytes for matrix in [*matrices, head(model.params)])
    assert flops == 2 * 4 * read / 4


@pytest.mark.parametrize("wrong", [["--rows", "0"], ["--tokens", "0"], ["--rounds", "0"]])
def test_nothing_to_measure_is_refused(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "m")
    tiny.tokenizer().save_pretrained(folder)
    assert main(["bench", "generate", "--model", str(folder), *wrong]) == 2
    assert "at least 1" in capsys.readouterr().err
