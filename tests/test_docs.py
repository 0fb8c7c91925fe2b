"""The documentation: every snippet of README and docs runs as printed, links lead somewhere, and made pages are current.

Snippets of a page run in order, in one folder and one namespace. In place of the default model and its variants stands a narrow random
model with as many layers and heads and the same tokenizer, so that a page takes seconds and nothing is fetched.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jaxmed.cli.main import COMMANDS, main
from tests import tiny

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(?P<language>[a-z]*)(?P<info>[^\n]*)\n(?P<text>.*?)^```", re.M | re.S)
NARROW = {"vocab_size": 49152, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 30, "num_attention_heads": 9}
NARROW |= {"num_key_value_heads": 3, "head_dim": 4, "max_position_embeddings": 8192, "tie_word_embeddings": True}
FILES = ("csv", "json", "yaml")
"""Languages of blocks that are files; their title is the file's name."""
NOT_RUN: dict[str, str] = {
    "needs a network": "it fetches packages or models",
    "takes minutes": "it is a command of real models that takes minutes",
    "needs PyTorch": "the reference of transformers runs in PyTorch",
    "needs accelerators": "it names a mesh that this machine lacks",
    "needs a browser": "pictures of figures are drawn by one",
}
"""Titles of the only snippets that may not run here, and why."""
BROWSER = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))) and find_spec("kaleido") is not None
LEFT_OUT = set(NOT_RUN) - ({"needs a browser"} if BROWSER else set())
"""Those that do not run on this machine."""
UNRUN = {
    "README.md": ("pip install .", "jaxmed demo"),
    "docs/contributing.md": ("pip install -e",),
    "docs/guides/evaluation.md": ("jaxmed evaluate --examples harmbench.csv", "pip install '.[harness]'"),
    "docs/guides/finetuning.md": ("jaxmed evaluate --model smollm2-135m-aligned",),
    "docs/guides/answers.md": ("jaxmed answers", "jaxmed answers"),
    "docs/guides/circuits.md": ("jaxmed circuit",),
    "docs/guides/gate.md": ("jaxmed gate",),
    "docs/guides/mediation.md": ("jaxmed study mediation",) * 3,
    "docs/guides/misalignment.md": ("jaxmed study misalignment", "from pathlib"),
    "docs/guides/probing.md": ("jaxmed probe search",),
    "docs/guides/pruning.md": ("jaxmed study pruning",),
    "docs/guides/scale.md": ("jaxmed sweep --mesh", "jaxmed sweep --hosts"),
    "docs/guides/sweep.md": ("figure.write_image",),
    "docs/models.md": ("jaxmed evaluate --model qwen2.5-coder-0.5b-instruct", "jaxmed parity"),
    "docs/quickstart.md": ("pip install .", "jaxmed demo"),
    "docs/results/aligned-variant.md": ("jaxmed evaluate --model smollm2-135m-aligned",),
    "docs/results/circuits.md": ("jaxmed circuit --pairs facts",),
    "docs/results/estimates.md": ("jaxmed sweep --pairs harm --limit 8", "jaxmed sweep --pairs unseen.jsonl"),
    "docs/results/mediation.md": ("jaxmed study mediation",),
    "docs/results/pruning-smollm2.md": ("jaxmed study pruning",),
}
"""All of them: page -> how each begins."""


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, title, text) of a page's fenced blocks."""
    found = []
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]*)"', block["info"])
        found.append((block["language"], title[1] if title else "", block["text"]))
    return found


def _commands(text: str) -> list[list[str]]:
    """The commands of a bash block, as words."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


@pytest.fixture(scope="module")
def narrow(smol: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that stands in for those that the pages name."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "narrow", **NARROW)
    smol.save_pretrained(folder)
    return folder


RUN = [page for page in PAGES if any(kind in ("python", "bash") and title not in LEFT_OUT for kind, title, _ in _blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=_name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_snippets_run(page: Path, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxmed.models import catalog

    def locate(name: str, *others: Any) -> Path:
        return narrow if name in (*catalog.CATALOG, *catalog.VARIANTS) else catalog.locate(name, *others)

    monkeypatch.setattr("jaxmed.models.load.locate", locate)
    monkeypatch.setattr("jaxmed.models.catalog.built_folder", lambda name: narrow)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    space: dict[str, Any] = {"__name__": "page"}
    for language, title, text in _blocks(page):
        if language == "python" and title not in LEFT_OUT:
            exec(compile(text, _name(page), "exec"), space)
        elif language == "bash" and title not in LEFT_OUT:
            for words in _commands(text):
                assert words[0] == "jaxmed", words
                assert main(words[1:]) == 0, words
        elif language in FILES and title:
            (tmp_path / title).write_text(text, encoding="utf-8")


def test_snippets_are_short_and_say_why_they_do_not_run() -> None:
    for page in PAGES:
        for language, title, text in _blocks(page):
            if language == "python":
                assert len([line for line in text.splitlines() if line.strip()]) <= 10, (page, text)
                assert title in ("", *NOT_RUN), (page, title)
                compile(text, _name(page), "exec")
            if language == "bash":
                assert title in ("", *NOT_RUN), (page, title)


def test_snippets_that_do_not_run_are_few_and_known() -> None:
    found = {_name(page): [text for _, title, text in _blocks(page) if title in NOT_RUN] for page in PAGES}
    assert {page for page, texts in found.items() if texts} == set(UNRUN)
    for page, begins in UNRUN.items():
        assert len(found[page]) == len(begins)
        assert all(text.startswith(begin) for text, begin in zip(found[page], begins, strict=True)), page


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_and_flag_exists(page: Path) -> None:
    from jaxmed.cli.parser import flags_of

    for language, _, text in _blocks(page):
        for words in _commands(text) if language == "bash" else ():
            if words[0] == "jaxmed":
                name = next((one for one in (" ".join(words[1:3]), words[1]) if one in COMMANDS), None)
                assert name is not None, words
                assert not {word.split("=")[0] for word in words if word.startswith("--")} - set(flags_of(COMMANDS[name])), words


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target
    for file in re.findall(r"`((?:tests|scripts|configs|jaxmed)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_made_pages_are_current() -> None:
    done = subprocess.run([sys.executable, "scripts/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
