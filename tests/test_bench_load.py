"""What loading is measured against, on a tiny file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.models.checkpoints import decoded
from tests import gguf_export, tiny


def test_bench_load_writes_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decoded, "LEAST", 0)
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    folder = tiny.write_checkpoint(
        tmp_path / "m", hidden_size=64, intermediate_size=64, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}
    )
    file = gguf_export.export(folder, tmp_path / "tiny.gguf", "llama", "Q8_0")
    assert main(["bench", "load", "--name", str(file), "--append", str(tmp_path / "B.md")]) == 0
    said = capsys.readouterr().out
    for what in ("read and decode", "first load", "second load", "weights alone"):
        assert what in said
        assert what in (tmp_path / "B.md").read_text()
    assert os.environ["JAXMED_CACHE"] == str(tmp_path / "cache")
    assert main(["bench", "load", "--name", str(folder)]) == 2


def test_what_is_not_decoded_is_not_measured(tmp_path: Path) -> None:
    from jaxmed.bench.load import measure_load

    with pytest.raises(jm.UserError, match="not read from a GGUF file"):
        measure_load(str(tiny.write_checkpoint(tmp_path / "m")))
