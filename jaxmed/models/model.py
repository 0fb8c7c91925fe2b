"""A model in memory: what `load` returns and everything else takes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxmed.models.catalog import digest
from jaxmed.models.config import ModelConfig
from jaxmed.models.transformer import Params


@dataclass
class Model:
    """A loaded model.

    Attributes:
        config: shape and arithmetic.
        params: nested dict of arrays; blocks are stacked on a leading layer axis.
        tokenizer: a transformers tokenizer, or None where the checkpoint has none.
        mesh: the device mesh the parameters live on, axes "data" and "model".
        name, revision: as asked for.
        files: the weight files.
        source: the folder or file it was read from; None for a model made in memory.
        source_config: config.json of the source, as it stands there.
        edits: what was done to the weights since their publication, as far as it is recorded; oldest first.
    """

    config: ModelConfig
    params: Params
    tokenizer: Any
    mesh: jax.sharding.Mesh
    name: str
    revision: str | None = None
    files: tuple[Path, ...] = ()
    source: Path | None = None
    source_config: Mapping[str, Any] | None = None
    edits: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over the weight files (over the digests, where there are several); "none" for a model made in memory."""
        digests = [digest(file) for file in self.files]
        if len(digests) < 2:
            return digests[0] if digests else "none"
        return hashlib.sha256("".join(digests).encode()).hexdigest()
