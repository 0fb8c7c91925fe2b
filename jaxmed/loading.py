"""`jm.load`: a model by name, built first where it is a variant, and checked."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxmed.finetuning.variants import build_variant
from jaxmed.models.catalog import needs_building
from jaxmed.models.load import load as load_unchecked
from jaxmed.models.model import Model
from jaxmed.parity.selfcheck import check_once


def load(
    name_or_path: str | Path,
    dtype: str | None = "float32",
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    int8: bool = False,
    template_from: str | None = None,
    adapter: str | Path | None = None,
    check: bool = True,
) -> Model:
    """Loads a model: a known name, a local folder, a .gguf file, a Hugging Face name, or what `jaxmed convert --to orbax` wrote.

    Args:
        name_or_path: see `jaxmed models` for the known names.
        dtype: "float32" or "bfloat16", for weights and matmuls. The residual stream and the outcomes are float32 in both.
        revision: branch, tag or commit on the hub, such as a training stage.
        mesh: device mesh with axes "data", "fsdp" and "tensor" (`jm.make_mesh`); by default all local devices on "data".
        int8: keep the blocks' matrices as int8 with one scale per output channel, for models that do not fit otherwise.
        template_from: a model whose chat template is used, for base models that have none.
        adapter: a LoRA adapter to merge in, as the folder that PEFT saves.
        check: run `jm.self_check` on it, once for the same weights, code and devices.

    Raises:
        UserError: unknown name, no network, or a checkpoint with any problem (all are listed together).
    """
    name = str(name_or_path)
    if needs_building(name):
        build_variant(name)
    model = load_unchecked(name, dtype, revision, mesh, int8, template_from, adapter)
    if check:
        check_once(model)
    return model
