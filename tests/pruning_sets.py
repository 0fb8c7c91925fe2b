"""What the tests of pruning share: two sets of examples, and families in both runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jaxmed as jm
from jaxmed.models.load import load
from jaxmed.models.model import Model
from jaxmed.pruning.job import KINDS
from tests import reference, tiny

BEHAVIOUR = [jm.Example(f"ask {i}" + "x" * (5 * i % 13), f"no {'abc'[i % 3] * (i % 4 + 1)}") for i in range(9)]
PRESERVE = [jm.Example(f"tell {i}", f"yes {'de'[i % 2] * (i % 6 + 1)}") for i in range(7)]
ALL = tuple(f"{which}_{kind}" for which in ("behaviour", "preserve") for kind in KINDS)


def loaded(name: str, folder: Path) -> tuple[Model, Any]:
    made = reference.save(name, folder)
    model = load(str(folder))
    model.tokenizer = tiny.tokenizer()
    return model, made
