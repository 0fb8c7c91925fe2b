"""The README's Python example runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_example_prints_the_top_neurons(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.S)
    assert example is not None
    code = example[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10


def test_every_command_that_the_readme_names_exists() -> None:
    from jaxmed.cli.main import COMMANDS

    named = re.findall(r"^jaxmed (\w+) ([a-z-]+)?", README, re.M)
    assert len(named) > 10
    for command, second in named:
        assert command in COMMANDS or f"{command} {second}" in COMMANDS


def test_the_family_that_the_readme_shows_is_the_one_in_the_package() -> None:
    from jaxmed.models.families import phi

    source = Path(phi.__file__).read_text(encoding="utf-8")
    assert source in README
    assert len(source.splitlines()) < 60
