"""The catalogue's models of other families against transformers on the same decoded weights; they are fetched where they are not cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.models.catalog import locate
from jaxmed.parity.compare import make_reference, read_reference

TEXT = "The capital of France is Paris. def add(a, b):\n    return a + b\n" * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-3-270m", "qwen2.5-coder-0.5b-instruct"])
def test_logits_and_sites_of_real_checkpoints(tmp_path: Path, name: str) -> None:
    try:
        locate(name)
    except jm.UserError as error:
        pytest.skip(f"not to be had here: {error}")
    model = jm.load(name)
    ids = np.asarray(model.tokenizer(TEXT)["input_ids"])[:40]
    make_reference(model, None, ids, tmp_path / "reference.safetensors")
    wanted = read_reference(tmp_path / "reference.safetensors")
    logits, found = jm.forward(model, ids, taps=tuple(wanted.sites))
    assert np.abs(np.asarray(logits)[0] - wanted.logits).max() <= 2e-4
    for site, there in wanted.sites.items():
        here = np.asarray(found[site], np.float32)[:, 0].reshape(there.shape)
        most = 1e-4 if site == "attention_pattern" else 1e-5  # Qwen's biases make scores of 1e3, whose rounding is 1e-4 of a pattern
        assert np.abs(here - there).max() <= most * max(1.0, np.abs(there).max()), site
