"""The commands `prune curve` and `prune transfer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype, load_model, parse_layers
from jaxmed.errors import UserError
from jaxmed.models.catalog import DEFAULT
from jaxmed.prompts.examples import chosen
from jaxmed.pruning.rule import Rule

ScoreName = Literal["positive", "absolute", "wanda", "magnitude", "random", "signed"]


@dataclass(frozen=True)
class Measuring:
    """What pruned models are measured on."""

    tests: tuple[str, ...] = ("rude", "ordinary")
    """Examples files with responses, or bundled sets: the loss on each is measured before and after."""
    split: str = "heldout"
    """Rows of this split, where a file has splits; empty: all."""
    limit: int | None = None
    """The first so many examples of each set only."""
    text: str = "neutral"
    """Plain text file for the perplexity, or the bundled one: neutral. Empty: none."""
    form: Literal["plain", "space", "qa", "chat"] = "plain"
    """How prompt and response are joined, as in `prune score`."""
    seeds: int = 1
    """Draws of random masks with the same counts per matrix."""
    model: str = DEFAULT
    """The scored model: known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    dtype: Dtype = "float32"
    """Weights and matmuls."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    resume: bool = False
    """Go on with what --out holds."""
    dry_run: bool = False
    """Print the plan and stop."""

    def sets(self) -> dict[str, list[Any]]:
        """The test sets by name."""
        return {Path(source).stem: chosen(source, self.split, self.limit) for source in self.tests}


@dataclass(frozen=True)
class Curve(Rule, Measuring):
    """What a behaviour and everything else lose as more of its weights are pruned, beside random weights of the same counts."""

    scores: Path = Path("jaxmed-scores")
    """Folder of `prune score`."""
    out: Path = Path("jaxmed-curve")
    """Folder for curve.csv, curve.html and run.json."""
    qs: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Shares of weights that are chosen, instead of --q."""
    against: tuple[ScoreName, ...] = ("random",)
    """Other rules by which as many weights are chosen; random: the same counts per matrix."""
    layers: str = ""  # type: ignore[assignment]
    """Layers whose matrices may be chosen from, such as 9,19,20-29; empty: all."""
    config: Config = None

    def run(self) -> None:
        """Selects, prunes in memory, measures, draws."""
        from jaxmed.pruning.curve import CURVE, run_curve
        from jaxmed.pruning.measure import make_tests
        from jaxmed.pruning.scores import read_scores
        from jaxmed.reports.curves import write_pruning_curve

        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Rule)}
        given |= {"layers": parse_layers(self.layers) or ()}
        rule, scores, sets = Rule(**given), read_scores(self.scores), self.sets()
        masks = len(self.qs) * (1 + sum(self.seeds if score == "random" else 1 for score in self.against))
        show.lines(f"prune curve: {self.model}", plan_lines(masks, sets, self.text))
        if self.dry_run:
            return
        done = begin(self, self.out, CURVE, {"scores": str(self.scores), "rule": given, "qs": self.qs, "against": self.against})
        model = load_model(self.model, self.dtype, None, self.mesh)
        tests = make_tests(model, sets, self.text, form=self.form)
        with show.progress("curve", masks + 1, "masks") as report:
            run_curve(model, scores, tests, rule, self.qs, self.against, self.seeds, done, keep(self.out / CURVE, done, report))
        show_rows(self.out / CURVE, ("rule", "q", "seed"))
        show.out.print(f"curve: {write_pruning_curve(self.out / CURVE, self.out / 'curve.html')}", markup=False)


@dataclass(frozen=True)
class Transfer(Measuring):
    """Prunes for each of several behaviours, and tests every other one: a matrix of what is lost."""

    masks: tuple[Path, ...] = ()
    """Mask files, one per behaviour; their names name the rows."""
    out: Path = Path("jaxmed-transfer")
    """Folder for transfer.csv, transfer.html and run.json."""
    config: Config = None

    def run(self) -> None:
        """Prunes in memory, measures, draws."""
        from jaxmed.pruning import read_mask
        from jaxmed.pruning.curve import TRANSFER, run_transfer
        from jaxmed.pruning.measure import make_tests
        from jaxmed.reports.curves import write_transfer

        if not self.masks:
            raise UserError("Give at least one mask file: --masks A.safetensors B.safetensors.")
        masks = {file.stem: read_mask(file) for file in self.masks}
        if len(masks) < len(self.masks):
            raise UserError("Two mask files have the same name; the rows are named after them.")
        sets = self.sets()
        trials = len(masks) * (1 + self.seeds)
        show.lines(f"prune transfer: {self.model}", plan_lines(trials, sets, self.text))
        if self.dry_run:
            return
        done = begin(self, self.out, TRANSFER, {"masks": {name: dict(mask.rule) for name, mask in masks.items()}})
        model = load_model(self.model, self.dtype, None, self.mesh)
        tests = make_tests(model, sets, self.text, form=self.form)
        with show.progress("transfer", trials, "masks") as report:
            run_transfer(model, masks, tests, self.seeds, done, keep(self.out / TRANSFER, done, report))
        show_rows(self.out / TRANSFER, ("mask", "seed"))
        show.out.print(f"transfer: {write_transfer(self.out / TRANSFER, self.out / 'transfer.html')}", markup=False)


def plan_lines(masks: int, sets: Mapping[str, Sequence[Any]], text: str) -> list[str]:
    """What will be measured, in words."""
    each = ", ".join(f"{len(found)} of {name}" for name, found in sets.items())
    return [f"{masks} masks, each applied in memory; examples: {each}" + (f"; perplexity on {text}" if text else "")]


def begin(command: Measuring, out: Path, table: str, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Begins or continues a folder; returns the rows it holds."""
    from jaxmed import results
    from jaxmed.provenance import versions
    from jaxmed.pruning.curve import read_rows

    names = {results.RUN, results.RUN + ".tmp", table, table + ".tmp", table.replace(".csv", ".html"), table.replace(".csv", ".html.tmp")}
    same = ("model", "dtype", "tests", "split", "limit", "text", "form", "seeds")
    manifest = {**{name: getattr(command, name) for name in same}, **asked}
    if results.RUN in results.check_contents(out, command.resume, names):
        results.check_same(out, results.read_run(out)["manifest"], manifest)
        return read_rows(out / table)
    out.mkdir(parents=True, exist_ok=True)
    results.write_json(out / results.RUN, {"manifest": manifest, "versions": versions()})
    return []


def keep(file: Path, done: Sequence[dict[str, Any]], report: Any) -> Any:
    """A callback that keeps every new row at once."""
    from jaxmed.pruning.curve import write_rows

    rows = list(done)
    if rows:
        report(len(rows), 0, "resumed")

    def one(row: dict[str, Any]) -> None:
        rows.append(row)
        write_rows(file, rows)
        report(1, 1, "")

    return one


def show_rows(file: Path, keys: Sequence[str]) -> None:
    """Prints a table of the rows: keys, weights, the rise of every loss, the perplexity's ratio; intervals are in the file."""
    from rich.table import Table

    from jaxmed.pruning.curve import read_rows

    rows = read_rows(file)
    names = [column.removesuffix("_rise") for column in rows[0] if column.endswith("_rise")]
    table = Table(title=f"rise of the loss, nats per response token (95 % intervals: {file})", title_justify="left")
    for column in (*keys, "weights", *names, *(["perplexity x"] if "perplexity_ratio" in rows[0] else [])):
        table.add_column(column, justify="left" if column in keys else "right")
    for row in rows:
        cells = [f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        ratio = [f"{row['perplexity_ratio']:.3f}"] if "perplexity_ratio" in row else []
        table.add_row(*cells, f"{int(row['weights']):,}", *(f"{row[f'{name}_rise']:+.3f}" for name in names), *ratio)
    show.out.print(table)
