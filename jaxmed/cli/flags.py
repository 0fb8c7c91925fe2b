"""Flags that several commands share. Each is declared here once, with its meaning and default, and inherited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxmed.cli import show
from jaxmed.errors import UserError
from jaxmed.experiments.specs import FormSpec
from jaxmed.files import check_file
from jaxmed.models.catalog import DEFAULT, VARIANTS, needs_building
from jaxmed.prompts.forms import FormName

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ConfigFlags:
    """What every command takes."""

    config: Path | None = None
    """YAML file with any of these flags as 'flag: value'; flags given here win."""


@dataclass(frozen=True, kw_only=True)
class PlanFlags(ConfigFlags):
    """Of a command that can be planned."""

    dry_run: bool = False
    """Print the plan and its cost, and stop before weights are loaded."""


@dataclass(frozen=True, kw_only=True)
class ResumeFlag:
    """Of a command that can be continued."""

    resume: bool = False
    """Continue the run that --out holds: what is finished is not computed again."""


@dataclass(frozen=True, kw_only=True)
class LogFlag:
    """Of a command that shows how far it is."""

    log_json: bool = False
    """Write progress to stderr as lines of JSON, for programs that collect logs."""


@dataclass(frozen=True, kw_only=True)
class RunFlags(LogFlag, ResumeFlag, PlanFlags):
    """Of a command that fills a folder and can be continued."""

    out: Path = Path("jaxmed-out")
    """Folder that the results are written to."""


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """How weights are loaded, whichever they are."""

    dtype: Dtype = "float32"
    """Number format of weights and matmuls; residual stream, outcomes and sums are float32 in both."""
    template_from: str | None = None
    """Model whose chat template is used, for base models that have none."""
    int8: bool = False
    """Keep the blocks' matrices as int8 with one scale per output channel, for models that do not fit otherwise."""
    mesh: str | None = None
    """Device mesh, such as data=4,fsdp=2,tensor=2: data and fsdp split rows, fsdp and tensor weights; default: all devices on data."""


@dataclass(frozen=True, kw_only=True)
class HostsFlags:
    """Whether this is one of several processes."""

    hosts: str = ""
    """Several processes: auto (Slurm, Kubernetes, Open MPI or Cloud TPU say who takes part), or HOST:PORT,COUNT,NUMBER with the address of
    process 0. All are given the same other flags and see the same --out."""
    hosts_wait: int = 300
    """Seconds that processes wait for each other at the beginning."""

    def join(self) -> None:
        """Joins the others, and says what was found; from then on the first process alone prints.

        Raises:
            UserError: see `jaxmed.hosts.join`.
        """
        from jaxmed.hosts import join, leads

        told = join(self.hosts, self.hosts_wait)
        show.out.quiet = show.err.quiet = not leads()
        if told:
            show.err.print(told, markup=False, highlight=False)


@dataclass(frozen=True, kw_only=True)
class SourceFlags(LoadFlags):
    """Which weights are loaded, and how."""

    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hugging Face hub, such as a training stage."""
    adapter: Path | None = None
    """LoRA adapter to merge into the weights, as the folder that PEFT saves."""

    def describe(self) -> Any:
        """The model's config and tokenizer, without weights: enough to check a request and to plan it.

        Of a variant that is not built yet, those of the model that it is made from.

        Raises:
            UserError: no such model, adapter or mesh; what does not fit the model.
        """
        from jaxmed.models.load import describe

        name = self.model
        if needs_building(name):
            show.lines(name, [f"not built yet: {VARIANTS[name].cost}"])
            name = VARIANTS[name].base
        return describe(name, self.dtype, self.revision, self._mesh(), **self._how())

    def load(self) -> Any:
        """The model with its weights, checked against itself; builds a variant that the cache does not hold."""
        from jaxmed.models.load import load
        from jaxmed.parity.selfcheck import check_once

        if needs_building(self.model):
            build(self.model)
        model = load(self.model, self.dtype, self.revision, self._mesh(), **self._how())
        check_once(model)
        return model

    def asked(self) -> dict[str, Any]:
        """What the user asked to load, for the record of a run."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(type(self)) if one.name in MODEL_FLAGS}

    def _mesh(self) -> Any:
        from jaxmed.distributed import make_mesh

        return make_mesh(self.mesh)

    def _how(self) -> dict[str, Any]:
        return {"int8": self.int8, "template_from": self.template_from, "adapter": self.adapter}


@dataclass(frozen=True, kw_only=True)
class ModelFlags(SourceFlags):
    """The model that a command works on: the same flags in every command."""

    mask: Path | None = None
    """Mask file of `jaxmed prune` whose weights are set to zero in memory, after loading."""

    def describe(self) -> Any:
        """As for any model; a mask that cannot be read or does not fit is refused too."""
        from jaxmed.pruning.apply import check_mask, mask_edit

        mask, model = self._read_mask(), super().describe()
        if mask is None:
            return model
        if not needs_building(self.model):
            check_mask(model, mask)
        return replace(model, history=(*model.history, mask_edit(mask)))

    def load(self) -> Any:
        """As for any model, with the mask applied."""
        from jaxmed.pruning.apply import apply_mask

        mask, model = self._read_mask(), super().load()
        return model if mask is None else apply_mask(model, mask)

    def _read_mask(self) -> Any:
        from jaxmed.pruning.masks import read_mask

        return None if self.mask is None else read_mask(self.mask)


@dataclass(frozen=True, kw_only=True)
class OneDeviceFlag:
    """For commands that read weights without running them."""

    mesh: str | None = "data=1"
    """Device mesh to load onto, such as tensor=4 for a model that is larger than one device."""


@dataclass(frozen=True, kw_only=True)
class NewFolderFlag:
    """Of a command that writes a model."""

    out: Path
    """Folder to write; must not exist yet, or be empty."""


MODEL_FLAGS = tuple(one.name for one in fields(ModelFlags) if one.name != "mesh")


@dataclass(frozen=True, kw_only=True)
class LimitFlag:
    """How much of a file is taken."""

    limit: int | None = None
    """Take the first so many rows of each file, 1 or more; default: all."""

    def first(self, rows: Sequence[T]) -> Sequence[T]:
        """The rows that the limit leaves; a UserError where it leaves none."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit} leaves no rows. Give 1 or more.")
        return rows[: self.limit]


@dataclass(frozen=True, kw_only=True)
class FormFlag:
    """How prompts and what follows them are written."""

    form: FormName = "chat"
    """How prompt and answer are joined. chat: the chat template; text: directly; plain: by a newline; space: by a space; qa: 'Q:, A:'."""


@dataclass(frozen=True, kw_only=True)
class SplitFlag:
    """Which rows of a file are taken."""

    split: Literal["", "train", "heldout"] = "heldout"
    """Take rows of this split, where a file has splits; empty: all rows."""


@dataclass(frozen=True, kw_only=True)
class TrainSplitFlag:
    """Which rows of a file are learned from."""

    split: Literal["", "train", "heldout"] = "train"
    """Take rows of this split, where a file has splits; empty: all rows."""


@dataclass(frozen=True, kw_only=True)
class SetFlags(LimitFlag, SplitFlag, FormSpec):
    """Which rows of example files are taken, and how their prompts and responses are joined."""


def build(name: str) -> None:
    """Builds a variant of a known model, with a progress display, unless the cache holds it."""
    from jaxmed.finetuning.variants import build_variant

    build_variant(name, show.progress)


def check_absent(file: Path | None, flag: str = "--out") -> None:
    """Raises a UserError where a file that is to be written exists already, or its path cannot be used."""
    if file is not None:
        check_file(file, flag)
    if file is not None and file.exists():
        raise UserError(f"{flag} {file} exists already. Give another name; nothing was written.")


def check_layers(layers: Sequence[int], config: Any) -> None:
    """Raises a UserError for layers that a model does not have."""
    wrong = [layer for layer in layers if layer >= config.layers]
    if wrong:
        raise UserError(f"--layers names layer {wrong[0]}; this model has layers 0 to {config.layers - 1}.")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
