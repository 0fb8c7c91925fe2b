"""What the tests of exports share: a folder to copy, and comparisons of copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxmed as jm
from tests import tiny


def written(folder: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    tiny.write_checkpoint(folder, tie_word_embeddings=True)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def same_bits(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and np.array_equal(one.view(np.uint8), two.view(np.uint8))


def refused_with(tmp_path: Path, act: Callable[[], Any]) -> str:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(jm.UserError) as caught:
        act()
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)
