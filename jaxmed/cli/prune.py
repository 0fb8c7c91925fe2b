"""The commands `prune score`, `prune select`, `prune apply`, `prune combine` and `prune compare`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype, load_model
from jaxmed.errors import UserError
from jaxmed.models.catalog import DEFAULT
from jaxmed.models.config import parse_layers
from jaxmed.prompts.examples import chosen
from jaxmed.pruning.rule import Rule

Kind = Literal["behaviour_signed", "behaviour_absolute", "behaviour_inputs", "preserve_signed", "preserve_absolute", "preserve_inputs"]


@dataclass(frozen=True)
class Score:
    """Scores every weight of the blocks' matrices in one pass over the examples: signed SNIP on a behaviour, absolute on a preserve set."""

    behaviour: str = "rude"
    """Examples (.jsonl, .csv, .parquet; prompt, response) of the behaviour to remove, or a bundled set."""
    preserve: str = "ordinary"
    """Examples of what is to be kept, or a bundled set."""
    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    out: Path = Path("jaxmed-scores")
    """Folder for the scores and run.json."""
    kinds: tuple[Kind, ...] = ("behaviour_signed", "preserve_absolute")
    """What is summed over the examples: gradients, their absolute values, or squared inputs (for Wanda)."""
    split: str = "train"
    """Rows of this split, where the file has splits; empty: all."""
    limit: int | None = None
    """The first so many examples of each set only."""
    form: Literal["plain", "space", "qa", "chat"] = "plain"
    """plain: prompt, newline, response; space: a space between; qa: 'Q: ... A:'; chat: the chat template."""
    scored_separator: bool = False
    """Score what stands between prompt and response too."""
    max_length: int = 0
    """Limit of an example's tokens; what is longer loses its end. 0: the model's."""
    rows: int = 0
    """Examples per device and batch; 0: as many as keep the matmuls busy."""
    layers_per_pass: int = 0
    """Layers scored in one pass over the data; 0: as many as fit the memory."""
    remat: bool | None = None
    """Run blocks again for their gradients, to save memory; default: where needed to fit."""
    adapter: Path | None = None
    """LoRA adapter to merge into the weights, as the folder that PEFT saves."""
    dtype: Dtype = "float32"
    """Weights and matmuls; sums are float32 in both."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    resume: bool = False
    """Go on with what --out holds."""
    dry_run: bool = False
    """Print the plan and stop."""
    config: Config = None

    def run(self) -> None:
        """Checks, plans, scores."""
        from jaxmed.pruning.scores import check, run
        from jaxmed.pruning.store import LEGAL
        from jaxmed.runs.folder import check_folder

        check_folder(self.out, self.resume, LEGAL)
        model = load_model(self.model, self.dtype, self.revision, self.mesh, weights=not self.dry_run, adapter=self.adapter)
        names = ("form", "scored_separator", "max_length", "rows", "layers_per_pass", "remat")
        wanted = {which for which in ("behaviour", "preserve") if any(kind.startswith(which) for kind in self.kinds)}
        sets = {
            which: chosen(getattr(self, which), self.split, self.limit) if which in wanted else [] for which in ("behaviour", "preserve")
        }
        job = check(
            model, sets.get("behaviour", []), sets.get("preserve", []), kinds=self.kinds, **{name: getattr(self, name) for name in names}
        )
        show.lines(f"prune score: {self.model}, {self.dtype}", plan_lines(job))
        if self.dry_run:
            return
        with show.progress("scores", job.batches, "examples") as report:
            scores = run(job, self.out, self.resume, report)
        losses = [
            f"{which}: {scores.examples[which]} examples, mean loss {loss:.4f} nats per token" for which, loss in scores.losses.items()
        ]
        show.lines("finished", [*losses, f"scores: {self.out}"])


def plan_lines(job: Any) -> list[str]:
    """The cost of a scoring run, in words."""
    from jaxmed.pruning.scores import estimate_flops
    from jaxmed.runs.cost import matmul_rate, show_time

    lines = []
    for which, plan in job.plans.items():
        found = job.sets[which]
        tokens, scored = sum(len(one.ids) for one in found), sum(len(one.ids) - one.prompt for one in found)
        shapes = ", ".join(f"{one.shape.rows} x {one.shape.length}" for one in plan.groups)
        again = ", blocks run again" if plan.remat else ""
        lines.append(
            f"{which}: {len(found)} examples, {tokens:,} tokens, {scored:,} of them responses; {len(plan.spans)} x {plan.batches} batches "
            f"of {shapes} tokens{again}; at most {plan.bytes / 1e9:.1f} GB on a device"
        )
        cut = sum(one.cut > 0 for one in found)
        lines += [f"{which}: {cut} responses are longer than the limit of tokens and lose their end"] if cut else []
    flops, first = estimate_flops(job), next(iter(job.plans.values())).groups[-1].shape
    rate = matmul_rate(job.model.config, job.model.mesh, first.rows * first.length // job.model.mesh.shape["data"])
    return [*lines, f"{flops / 1e12:.2f} TFLOP of matmuls, about {show_time(flops / rate)}"]


@dataclass(frozen=True)
class Select(Rule):
    """Makes a mask from scores by a rule; by default the top q of -S (behaviour, signed) without the top p of A (preserve, absolute)."""

    scores: Path = Path("jaxmed-scores")
    """Folder of `prune score`."""
    preserve: Path | None = None
    """Folder whose preserve scores are taken, where the set was scored apart; default: those in --scores."""
    out: Path = Path("mask.safetensors")
    """The mask file; must not exist yet."""
    layers: str = ""  # type: ignore[assignment]
    """Layers whose matrices may be chosen from, such as 9,19,20-29; empty: all."""
    tag: str = ""
    """What the mask is for; one tagged 'attack' is applied in memory only."""
    model: str = ""
    """Model whose weights are read, for wanda and magnitude; empty: the scored one."""
    config: Config = None

    def run(self) -> None:
        """Selects and writes."""
        from jaxmed.pruning import read_scores, select, write_mask

        if self.out.exists():
            raise UserError(f"{self.out} exists already. Give another name; nothing was written.")
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Rule)}
        given |= {"layers": parse_layers(self.layers) or ()}
        rule = Rule(**given)
        scores = read_scores(self.scores)
        preserve = None if self.preserve is None else read_scores(self.preserve)
        mask = select(scores, rule, self._weights(scores, rule), self.tag, preserve)
        write_mask(mask, self.out)
        show.lines(f"mask: {self.out}", describe_mask(mask))

    def _weights(self, scores: Any, rule: Any) -> Any:
        from jaxmed.models.named_weights import weights_by_name
        from jaxmed.pruning.selection import needs_weights

        if not needs_weights(rule):
            return None
        model = load_model(self.model or scores.model, "float32", None, "data=1")
        if model.identity != scores.weights:
            raise UserError(
                f"The scores in {self.scores} are of other weights than {model.name!r} has. Give the scored model with --model."
            )
        return weights_by_name(model)


def describe_mask(mask: Any) -> list[str]:
    """A mask in words: how many weights, and of which kinds of matrices."""
    from jaxmed.models.named_weights import kind_of

    kinds: dict[str, list[int]] = {}
    for name, count in mask.counts().items():
        kinds.setdefault(kind_of(name), []).append(count)
    each = ", ".join(f"{kind} {sum(found):,} (at most {max(found):,} in a matrix)" for kind, found in kinds.items())
    return [f"{mask.count:,} of {mask.numbers:,} weights ({mask.count / max(1, mask.numbers):.2e}), of {mask.model}", each]


@dataclass(frozen=True)
class Apply:
    """Writes a model with the weights of a mask set to zero, to their mean, or scaled."""

    mask: Path
    """Mask file."""
    out: Path
    """Folder to write; must not exist yet, or be empty."""
    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    to: Literal["zero", "mean", "scale"] = "zero"
    """Masked weights become zero, the mean of the masked weights of their matrix, or are multiplied by --factor."""
    factor: float = 0.0
    """For 'scale'."""
    any_model: bool = False
    """Take a mask that was made of other weights of the same shapes, such as an aligned sibling's."""
    format: Literal["huggingface", "orbax"] = "huggingface"
    """A folder that transformers loads, or a sharded checkpoint of our own."""
    dtype: Dtype = "float32"
    """Weights."""
    mesh: str = "data=1"
    """Device mesh to load onto, such as model=4 for a model larger than one device."""
    dry_run: bool = False
    """Say what would be edited and stop."""
    config: Config = None

    def run(self) -> None:
        """Loads, edits, writes."""
        from jaxmed.models.checkpoints.export import export_folder
        from jaxmed.models.checkpoints.new_folder import check_vacant
        from jaxmed.models.checkpoints.orbax_store import save_store
        from jaxmed.pruning import apply_mask, read_mask
        from jaxmed.pruning.apply import check_mask

        check_vacant(self.out, 0)
        mask = read_mask(self.mask)
        model = load_model(self.model, self.dtype, None, self.mesh, weights=not self.dry_run)
        check_mask(model, mask, self.any_model, written=True)
        show.lines(f"prune apply: {self.mask} to {self.model}", describe_mask(mask))
        if not self.dry_run:
            edited = apply_mask(model, mask, self.to, self.factor, self.any_model)
            {"huggingface": export_folder, "orbax": save_store}[self.format](edited, self.out)
            show.out.print(f"written: {self.out}", markup=False)


@dataclass(frozen=True)
class Combine:
    """Intersects, unites or subtracts masks of one model, or inverts one."""

    masks: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Mask files."""
    how: Literal["intersect", "union", "subtract", "invert"] = "intersect"
    """In all masks; in any; in the first and no other; not in the one given."""
    out: Path = Path("combined.safetensors")
    """The mask file; must not exist yet."""
    config: Config = None

    def run(self) -> None:
        """Reads, combines, writes."""
        from jaxmed.pruning import combine, read_mask, write_mask

        masks = [read_mask(file) for file in self.masks]
        if self.how == "invert" and len(masks) != 1:
            raise UserError(f"To invert, give one mask, not {len(masks)}.")
        mask = masks[0].inverted() if self.how == "invert" else combine(masks, self.how)
        write_mask(mask, self.out)
        show.lines(f"mask: {self.out}", describe_mask(mask))


@dataclass(frozen=True)
class Compare:
    """Counts what masks share, pair by pair, against chance."""

    masks: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Mask files, at least two."""
    model: str = ""
    """Model whose weights the stratified chance is taken over; empty: plain chance alone."""
    config: Config = None

    def run(self) -> None:
        """Prints a table."""
        from itertools import combinations

        from rich.table import Table

        from jaxmed.models.named_weights import weights_by_name
        from jaxmed.pruning import overlap, read_mask

        if len(self.masks) < 2:
            raise UserError("Give at least two masks to compare.")
        short = len({file.stem for file in self.masks}) == len(self.masks)
        masks = {file.stem if short else str(file): read_mask(file) for file in self.masks}
        weights = weights_by_name(load_model(self.model, "float32", None, "data=1")) if self.model else None
        table = Table(title="weights that two masks share")
        for column in ("one", "other", "both", "Jaccard", "by chance", "by chance given |W|"):
            table.add_column(column)
        for one, other in combinations(masks, 2):
            found = overlap(masks[one], masks[other], weights.items() if weights else None)
            stratified = "" if found.stratified is None else f"{found.stratified:,.1f}"
            table.add_row(one, other, f"{found.both:,}", f"{found.jaccard:.4f}", f"{found.by_chance:,.1f}", stratified)
        show.out.print(table)
