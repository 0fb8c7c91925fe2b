"""Variants of known models that are fine-tuned from a bundled config on first use, and cached."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from jaxmed.errors import unknown
from jaxmed.finetuning import checkpoint
from jaxmed.finetuning.job import make_job
from jaxmed.finetuning.run import finish, run_job
from jaxmed.finetuning.settings import read_recipe
from jaxmed.models.catalog import VARIANTS, built_folder, cache_folder, is_built
from jaxmed.models.checkpoints.export import export_folder
from jaxmed.models.load import load
from jaxmed.runs.watch import Display, no_display


def build_variant(name: str, display: Display = no_display) -> Path:
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
    recipe = read_recipe(yaml.safe_load(variant.config_text()))
    job = make_job(load(recipe.model), *recipe.examples(), recipe.settings)
    scratch = cache_folder() / "builds" / folder.name
    with display(f"building {name}", job.steps, "tokens") as report:
        tuned = run_job(job, scratch, True, report)
    finish(tuned, scratch, ())
    export_folder(tuned.model, folder)
    checkpoint.clean(scratch, finished=True)
    return folder
