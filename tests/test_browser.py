"""Pages in a real browser: every figure is drawn, nothing is fetched, nothing is wrong; and pictures beside them."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.reports.answers import write_answers
from jaxmed.reports.gate import write_gate
from jaxmed.reports.page import write_report
from jaxmed.runs.legal import Legal, check_folder
from tests.test_report import MOST_BYTES, build, plots

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), "")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs a browser")
def test_a_browser_draws_every_figure(tmp_path: Path) -> None:
    html = write_report([build(tmp_path / "run")], tmp_path / "page.html").read_text()
    drawn, _ = _draw(tmp_path / "page.html")
    assert len(re.findall(r'class="main-svg"', drawn)) >= len(plots(html)) > 2
    assert "cannot be drawn" not in re.sub(r"<script.*?</script>", "", drawn, flags=re.S)
    old = html.replace("<script>\nasync function", "<script>\ndelete window.DecompressionStream;\nasync function")
    (tmp_path / "old.html").write_text(old)
    assert re.search(r'<div class="plot"[^>]*>The figures need a browser of 2023 or later', _draw(tmp_path / "old.html")[0])


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs a browser")
def test_a_browser_draws_the_pages_of_studies(tmp_path: Path) -> None:
    """Verdicts, figures and tables of a gate and of judged answers; no errors in the console, nothing fetched."""
    planted = jm.planted("gate")
    jm.gate(planted.model, planted.pairs, "logit-diff", form="text", windows=(8,), draws=1, tokens=2, text="", out=tmp_path / "gate")
    jm.answers(planted.model, planted.pairs[:12], {"a": [("mlp_out", 0, 0)]}, form="text", tokens=2, out=tmp_path / "answers")
    for page in (write_gate(tmp_path / "gate"), write_answers(tmp_path / "answers")):
        html = page.read_text()
        assert page.stat().st_size < MOST_BYTES
        assert not re.findall(r'(?:src|href)="(?:https?:)?//', html)
        drawn, said = _draw(page)
        assert len(re.findall(r'class="main-svg"', drawn)) >= len(plots(html)) >= 1
        assert "cannot be drawn" not in re.sub(r"<script.*?</script>", "", drawn, flags=re.S)
        assert drawn.index("<table") < drawn.index('class="plot')  # verdicts first
        assert not re.findall(r"CONSOLE.*(?:error|violat|Uncaught|refused)", said, re.IGNORECASE)


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and find_spec("kaleido")), reason="needs a browser")
def test_pictures_are_written_beside_the_page(tmp_path: Path) -> None:
    folder = build(tmp_path / "run", units=("neuron", "mlp_out"))
    assert main(["report", str(folder), "--images", "svg", "png"]) == 0
    count = len(plots((folder / "report.html").read_text()))
    svg, png = (sorted(folder.glob(f"report-*.{one}")) for one in ("svg", "png"))
    assert len(svg) == len(png) == count > 1
    assert all(b"<svg" in file.read_bytes()[:400] for file in svg)
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in png)
    assert check_folder(folder, True, Legal(("effects.zarr", "top.csv", "report.html")))


def test_pictures_that_cannot_be_drawn_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(tmp_path / "run", units=("mlp_out",))
    assert main(["report", str(folder), "--images", "gif"]) == 2
    assert "svg, png, pdf" in capsys.readouterr().err
    monkeypatch.setattr("jaxmed.reports.images.shutil.which", lambda name: None)
    assert main(["report", str(folder), "--images", "svg"]) == 2
    assert "Chrome or Chromium" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def _draw(page: Path) -> tuple[str, str]:
    """The page as a browser has it after its scripts, and what the browser logs."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--enable-logging=stderr", "--v=0"]
    command = [CHROMIUM, *flags, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr
