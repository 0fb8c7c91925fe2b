"""The commands `demo`, `models`, `sweep` and `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxmed.cli import show
from jaxmed.errors import UserError
from jaxmed.models.catalog import (
    CATALOG,
    DEFAULT,
    HUB_EXAMPLES,
    VARIANTS,
    cache_folder,
    cached_file,
    hub_cached,
    is_built,
    needs_building,
)
from jaxmed.models.config import parse_layers

Config = Annotated[Path | None, tyro.conf.arg(help="YAML file with any of these flags as 'flag: value'; flags given here win.")]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Sweep:
    """Exact effects of every unit on an outcome: effect = y(base; unit := its value in source) - y(base)."""

    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    pairs: str = "harm"
    """Pairs file (.jsonl, .csv, .parquet), or a bundled set: harm, control, facts."""
    out: Path = Path("jaxmed-sweep")
    """Folder for effects.zarr, run.json, top.csv and report.html."""
    outcome: tuple[str, ...] = ("log-odds",)
    """One or several of: logit-diff, log-odds, logprob, prefix-gap, sequence-logprob, kl (units: nats, logit-diff: logits)."""
    position: str = "last"
    """Patched tokens: last, user_last, header, user, each, all, an index (negative counts from the end), or a substring."""
    unit: tuple[str, ...] = ("neuron",)
    """One or several of: neuron, window, head_out, attention_out, mlp_out, residual_out."""
    window: int = 32
    """Adjacent neurons per window, for the unit 'window'."""
    layers: str = ""
    """Layers to sweep, such as 9,19,20-29; empty: all."""
    limit: int | None = None
    """Sweep the first so many pairs only."""
    method: Literal["exact"] = "exact"
    """How effects are computed."""
    dtype: Dtype = "float32"
    """Weights and matmuls; residual stream and outcomes are float32 in both."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    int8: bool = False
    """Keep the blocks' matrices as int8 with one scale per output channel, for models that do not fit otherwise."""
    adapter: Path | None = None
    """LoRA adapter to merge into the weights, as the folder that PEFT saves."""
    template_from: str | None = None
    """Model whose chat template is used, for base models that have none."""
    raw: bool = False
    """Feed plain text, without the chat template."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    top: int = 50
    """Units per kind in top.csv."""
    seed: int = 0
    """Seed of resamples and sign flips."""
    resume: bool = False
    """Go on with what --out holds."""
    dry_run: bool = False
    """Print the plan and stop."""
    config: Config = None

    def run(self) -> None:
        """Checks, plans, sweeps, summarises, reports."""
        more = {"int8": self.int8, "template_from": self.template_from, "adapter": self.adapter}
        model = load_model(self.model, self.dtype, self.revision, self.mesh, weights=not self.dry_run, **more)
        job = make_job(self, model)
        sweep_job(job, self.out, self.resume, self.dry_run)
        if not self.dry_run:
            write_report([self.out], self.out / "report.html")
            show.top_units(self.out)


def load_model(name: str, dtype: str, revision: str | None, mesh: str | None, weights: bool = True, **more: Any) -> Any:
    """Loads a model and checks it; without `weights` only its config and tokenizer. `more` as `load` takes it."""
    from jaxmed.distributed import make_mesh
    from jaxmed.models.load import describe, load
    from jaxmed.parity.selfcheck import check_once

    if not weights:
        if needs_building(name):
            show.lines(name, [f"not built yet: {VARIANTS[name].cost}"])
            name = VARIANTS[name].base
        return describe(name, dtype, revision, make_mesh(mesh), **more)
    if needs_building(name):
        build(name)
    model = load(name, dtype, revision, make_mesh(mesh), **more)
    check_once(model)
    return model


def masked(model: Any, mask: Path | None) -> Any:
    """The model with the weights of a mask file set to zero, where one is given."""
    from jaxmed.pruning import apply_mask, read_mask

    return model if mask is None else apply_mask(model, read_mask(mask))


def build(name: str) -> None:
    """Builds a variant of a known model, with a progress display, unless the cache holds it."""
    from jaxmed.finetuning.variants import build_variant

    build_variant(name, show.progress)


def make_job(command: Sweep, model: Any) -> Any:
    """The checked job of a sweep command."""
    from jaxmed.effects.job import Request, check
    from jaxmed.prompts import read_pairs

    pairs = read_pairs(command.pairs)[: command.limit]
    layers, position = parse_layers(command.layers), command.position
    request = Request(
        command.outcome, command.unit, position, command.window, layers, "text" if command.raw else "chat", command.seed, command.top
    )
    return check(model, pairs, request)


def sweep_job(job: Any, out: Path, resume: bool, dry_run: bool = False, title: str = "sweep") -> None:
    """Prints the plan of a job, then runs and summarises it."""
    from jaxmed.distributed import device_name
    from jaxmed.effects.job import estimate_rate, plan, progress_total
    from jaxmed.effects.summary import summarise
    from jaxmed.effects.sweep import run
    from jaxmed.results import LEGAL
    from jaxmed.runs.folder import check_folder

    check_folder(out, resume, LEGAL)
    rate = estimate_rate(job)
    show.lines(f"{title}: {job.model.name}, {job.model.config.dtype}, {device_name(job.model.mesh)}", plan(job, rate).lines())
    if dry_run:
        return
    with show.progress(title, progress_total(job)) as report:
        run(job, out, resume, report, rate)
    summarise(out, job.model, job.request.top, job.request.seed)


def write_report(folders: list[Path], file: Path) -> None:
    """Writes the HTML page of finished or half-made runs."""
    from jaxmed.reports.page import write_report as write
    from jaxmed.reports.study import is_study, write_study

    if is_study(folders):
        write_study(folders[0], file)
    else:
        write(folders, file)
    show.out.print(f"report: {file}", markup=False)


@dataclass(frozen=True)
class Demo:
    """Sweeps the default model: every neuron for two bundled pairs, and the layer, attention and MLP profile over more."""

    out: Path = Path("jaxmed-demo")
    """Folder for both tables and report.html; a second run continues what it holds."""
    pairs: int = 2
    """Pairs of the neuron sweep."""
    profile_pairs: int = 24
    """Pairs of the profile, spread over the harm categories."""
    dry_run: bool = False
    """Print the plan and stop."""
    config: Config = None

    def run(self) -> None:
        """Two sweeps and one page."""
        from jaxmed.effects.job import Request, check
        from jaxmed.prompts import read_pairs

        model = load_model(DEFAULT, "float32", None, None, weights=not self.dry_run)
        pairs = read_pairs("harm")
        spread = pairs[:: max(1, len(pairs) // self.profile_pairs)][: self.profile_pairs]
        jobs = {
            "profile": check(model, spread, Request(units=("attention_out", "mlp_out", "residual_out"))),
            "neurons": check(model, pairs[: self.pairs], Request()),
        }
        for name, job in jobs.items():
            sweep_job(job, self.out / name, True, self.dry_run, name)
        if not self.dry_run:
            write_report([self.out / name for name in jobs], self.out / "report.html")
            show.top_units(self.out / "neurons")


@dataclass(frozen=True)
class Models:
    """Lists known models, their sizes and licences, and what is on this machine."""

    build: str = ""
    """Variant to build now, such as smollm2-135m-aligned, instead of on its first use."""
    config: Config = None

    def run(self) -> None:
        """Prints a table."""
        from rich.table import Table

        if self.build:
            build(self.build)

        table = Table(title="Models by name")
        for column in ("name", "parameters", "licence", "here", "note"):
            table.add_column(column, no_wrap=column == "name")
        here = hub_cached()
        for name, known in CATALOG.items():
            held = (
                f"yes ({known.size / 1e6:.0f} MB)" if cached_file(name).is_file() else f"fetched on first use ({known.size / 1e6:.0f} MB)"
            )
            table.add_row(name, f"{known.parameters / 1e6:.0f}M", known.licence, held, known.note)
        for name, variant in VARIANTS.items():
            base = CATALOG[variant.base]
            held = "yes" if is_built(name) else "built on first use"
            table.add_row(name, f"{base.parameters / 1e6:.0f}M", base.licence, held, variant.note)
        for name, (size, licence) in HUB_EXAMPLES.items():
            table.add_row(name, size, licence, "yes" if name in here else "on the hub", "")
        for name in sorted(set(here) - set(HUB_EXAMPLES)):
            table.add_row(name, "", "", "yes", "in the Hugging Face cache")
        show.out.print(table)
        show.out.print(
            f"Cache: {cache_folder()}. A local folder (config.json and safetensors) or a .gguf file works as a name too.", markup=False
        )


@dataclass(frozen=True)
class Report:
    """Redraws the HTML page of one or several runs from their saved tables; runs no model."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """--out folders of sweeps, or one of a study."""
    out: Path | None = None
    """The HTML file; default: report.html in the first folder."""
    config: Config = None

    def run(self) -> None:
        """Writes the page."""
        if not self.folders:
            raise UserError("Give at least one --out folder of a sweep.")
        write_report(list(self.folders), self.out or self.folders[0] / "report.html")
