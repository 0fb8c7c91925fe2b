"""What functions of the package are given and return is what their annotations say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("test_joint", "test_edits", "test_cache", "test_scoring")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_annotations_hold_at_run_time(name: str) -> None:
    """Tests of what is refused are left out: they give values of other types."""
    command = [sys.executable, "-m", "pytest", f"tests/{name}.py", "-k", "not refused"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | {"JAXMED_TYPES": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


def test_a_wrong_annotation_is_found() -> None:
    wrong = "from tests import conftest; from jaxmed.errors import hint; hint('a', 3)"
    told = subprocess.run(
        [sys.executable, "-c", wrong], cwd=Path(__file__).parents[1], env=os.environ | {"JAXMED_TYPES": "1"}, capture_output=True, text=True
    )
    assert "TypeCheckError" in told.stderr
