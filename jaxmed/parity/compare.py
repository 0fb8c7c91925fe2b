"""A model against a reference file, layer by layer and site by site."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmed.errors import UserError
from jaxmed.interventions.sites import SITES
from jaxmed.models.checkpoints.export import export_folder
from jaxmed.models.model import Model
from jaxmed.runner import causal_layout, forward
from jaxmed.tokens import render

ORDER = tuple(SITES)
"""Sites in the order in which a block computes them."""


@dataclass(frozen=True)
class Reference:
    """Logits float32 [T, V] and sites [L, T, ...] of a run over tokens int [T], and who made them."""

    tokens: np.ndarray
    logits: np.ndarray
    sites: dict[str, np.ndarray]
    made_by: str
    dtype: str


@dataclass(frozen=True)
class Difference:
    """How far one site of one layer lies from the reference: largest and mean absolute difference, and the reference's largest value.

    `layer` is -1 for the logits.
    """

    layer: int
    site: str
    largest: float
    mean: float
    scale: float

    def parts(self, tolerance: float) -> bool:
        """Whether the largest difference exceeds `tolerance`, relative to the reference where its values exceed one."""
        return not self.largest <= tolerance * max(1.0, self.scale)


def read_reference(file: Path) -> Reference:
    """A reference file.

    Raises:
        UserError: no such file, or not one that `jaxmed parity --write` has made.
    """
    try:
        with safe_open(file, framework="numpy") as handle:
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - the handle is no mapping
            made = handle.metadata() or {}
        sites = {name: array for name, array in arrays.items() if name in SITES}
        return Reference(arrays["tokens"], arrays["logits"], sites, made["made_by"], made["dtype"])
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{file} is no reference file: {error!r}. Make one with `jaxmed parity --model MODEL --write FILE`.") from None


def make_reference(model: Model, folder: Path | None, tokens: np.ndarray, out: Path) -> None:
    """Has transformers compute a reference for token ids int [T] and writes it to `out`.

    Args:
        folder: the Hugging Face folder of the model; None: it is exported to a temporary one first (GGUF files).

    Raises:
        UserError: torch is not installed, or transformers cannot run the model.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "The reference 'transformers' needs PyTorch, which is not installed. Install it, or give --reference FILE, made elsewhere "
            "with `jaxmed parity --model MODEL --write FILE`."
        )
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "exported"
            export_folder(model, folder)
        command = [sys.executable, "-m", "jaxmed.parity.torch_reference", str(folder), str(out), model.config.dtype]
        done = subprocess.run(command, input=json.dumps(tokens.tolist()), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"transformers could not run {model.name!r}: {reason}")


def sample_tokens(model: Model, count: int, seed: int = 0) -> np.ndarray:
    """Token ids int [T] to compare on: a bundled prompt where the model has a tokenizer and `count` is 0, else random ids."""
    if model.tokenizer is not None and not count:
        from jaxmed.prompts import read_pairs

        return render(model.tokenizer, read_pairs("harm")[0], "base", "chat" if model.tokenizer.chat_template else "text").ids
    return np.random.default_rng(seed).integers(0, model.config.vocabulary, count or 64).astype(np.int32)


def compare(model: Model, reference: Reference) -> list[Difference]:
    """Differences of every site of every layer in the order of computation, and of the logits last.

    Raises:
        UserError: the reference is of a model of other shapes.
    """
    config = model.config
    if reference.logits.shape != (len(reference.tokens), config.vocabulary) or reference.tokens.max() >= config.vocabulary:
        raise UserError(
            f"The reference has logits {list(reference.logits.shape)}; this model gives {[len(reference.tokens), config.vocabulary]}. "
            "It was made from another model."
        )
    sites = tuple(name for name in ORDER if name in reference.sites)
    layout = causal_layout(1, len(reference.tokens))
    logits, taps = forward(config, model.params, reference.tokens[None], layout, None, sites)
    found = []
    for layer in range(config.layers):
        for name in sites:
            wanted = reference.sites[name]
            if len(wanted) != config.layers or wanted[layer].size != taps[name][layer].size:
                raise UserError(f"The reference's {name} has shape {list(wanted.shape)}; this model's is {list(taps[name].shape)}.")
            found.append(_difference(layer, name, np.asarray(taps[name][layer], np.float32).reshape(wanted[layer].shape), wanted[layer]))
    return [*found, _difference(-1, "logits", np.asarray(logits[0]), reference.logits)]


def _difference(layer: int, site: str, here: np.ndarray, there: np.ndarray) -> Difference:
    apart = np.abs(here - there)
    return Difference(layer, site, float(apart.max()), float(apart.mean()), float(np.abs(there).max()))


def first_parting(differences: list[Difference], tolerance: float) -> Difference | None:
    """The first site, in the order of computation, that parts from the reference; None where none does."""
    return next((difference for difference in differences if difference.parts(tolerance)), None)


def rows(differences: list[Difference]) -> list[dict[str, Any]]:
    """The differences as rows for a table file."""
    return [
        {"layer": d.layer if d.layer >= 0 else "", "site": d.site, "max": d.largest, "mean": d.mean, "scale": d.scale} for d in differences
    ]
