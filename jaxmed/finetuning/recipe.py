"""A fine-tuning run by name: which model, which examples, which settings; and the variants of known models that are built from one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxmed.errors import UserError, unknown
from jaxmed.finetuning.run import Job, Report, check, finish, make_settings, run
from jaxmed.finetuning.train import Settings
from jaxmed.models.catalog import VARIANTS, built_folder, cache_folder, is_built
from jaxmed.models.load import Model, load
from jaxmed.prompts.examples import HELDOUT, Example, read_examples


@dataclass(frozen=True)
class Recipe:
    """What is fine-tuned on what.

    Attributes:
        model: name of the model.
        data: examples file, or a bundled name. Rows whose split is "heldout" are never trained on.
        heldout: examples file of the held-out loss; empty: a share of `data`.
        heldout_share: that share, drawn by the seed.
        settings: see `train.Settings`.
    """

    model: str
    data: str
    heldout: str = ""
    heldout_share: float = 0.1
    settings: Settings = field(default_factory=Settings)

    def examples(self) -> tuple[list[Example], list[Example]]:
        """The examples to train on, and those of the held-out loss."""
        if not 0 <= self.heldout_share < 1:
            raise UserError(f"The held-out share is from 0 to below 1, not {self.heldout_share}.")
        rows = [row for row in read_examples(self.data) if row.split != HELDOUT]
        if not rows:
            raise UserError(f"{self.data} holds no rows to train on: all have the split {HELDOUT!r}.")
        if self.heldout:
            return rows, read_examples(self.heldout)
        count = round(self.heldout_share * len(rows))
        if count == len(rows):
            raise UserError(f"{self.data} has {len(rows)} rows to train on; a held-out share of {self.heldout_share} leaves none.")
        held = set(np.random.default_rng(self.settings.seed).permutation(len(rows))[:count].tolist())
        return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def make_job(recipe: Recipe, model: Model) -> Job:
    """The checked run of a recipe on its model, loaded."""
    return check(model, *recipe.examples(), recipe.settings)


def recipe_from(entries: Mapping[str, Any]) -> Recipe:
    """A recipe from the entries of a config file of `jaxmed finetune`; keys that only the command line knows are left out."""
    given = {key.replace("-", "_"): value for key, value in entries.items()}
    own = {f.name for f in fields(Recipe)} - {"settings"}
    named = {key: given.pop(key) for key in own if key in given}
    settings = {ALIASES.get(key, key): value for key, value in given.items() if key not in COMMAND_ONLY}
    return Recipe(**named, settings=make_settings(**settings))


ALIASES = {"raw": "plain"}
COMMAND_ONLY = frozenset(("command", "out", "save", "dtype", "resume", "mesh", "revision"))

Watch = Callable[[Job], AbstractContextManager[Report]]
"""Opens the display of a run's progress."""


def build_variant(name: str, watch: Watch | None = None) -> Path:
    """Makes a variant of `catalog.VARIANTS` if the cache does not hold it yet, and returns its folder.

    It says on stderr what it costs. An interrupted build goes on where it stood.

    Raises:
        UserError: unknown variant; anything that loading, fine-tuning or export raise.
    """
    if name not in VARIANTS:
        raise unknown("variant", name, VARIANTS)
    folder = built_folder(name)
    if is_built(name):
        return folder
    variant = VARIANTS[name]
    print(f"Building {name}: {variant.cost}. It is kept in {folder}.", file=sys.stderr)
    recipe = recipe_from(yaml.safe_load(variant.config_text()))
    job = make_job(recipe, load(recipe.model))
    scratch = cache_folder() / "builds" / folder.name
    begun = time.perf_counter()
    with (watch or (lambda _: nullcontext(lambda *_: None)))(job) as report:
        tuned = run(job, scratch, True, report)
    finish(tuned, scratch, (), time.perf_counter() - begun)
    from jaxmed.finetuning import checkpoint
    from jaxmed.models.checkpoints.export import export_folder

    export_folder(tuned.model, folder)
    checkpoint.clean(scratch, finished=True)
    return folder
