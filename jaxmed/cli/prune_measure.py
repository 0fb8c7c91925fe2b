"""The commands `prune curve`, `prune transfer` and `prune compression`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """How pruned models are measured."""

    split: str = "heldout"
    """Rows of this split, where a file has splits; empty: all."""
    limit: int | None = None
    """The first so many examples of each set only."""
    text: str = "neutral"
    """Plain text file for the perplexity, or the bundled one: neutral. Empty: none."""
    form: Literal["plain", "space", "qa", "chat"] = "plain"
    """How prompt and response are joined, as in `prune score`."""
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

    def sets(self, sources: Sequence[str]) -> dict[str, list[Any]]:
        """The test sets by name."""
        found = {Path(source).stem: self.rows(source) for source in sources}
        if len(found) < len(sources) or "scored" in found:
            raise UserError(f"Test sets are named after their files; {', '.join(sources)} has a name twice, or the reserved name 'scored'.")
        return found

    def rows(self, source: str, responses: bool = True) -> list[Any]:
        """Rows of a file or bundled set; none for an empty name."""
        return chosen(source, self.split, self.limit, responses) if source else []

    def manifest(self, *more: str) -> dict[str, Any]:
        """What makes two runs the same run: the values of these fields."""
        same = ("model", "dtype", "split", "limit", "text", "form", *more)
        return {name: str(value) if isinstance(value := getattr(self, name), Path) else value for name in same}


@dataclass(frozen=True)
class Curve(Rule, Measuring):
    """What a behaviour and everything else lose as more of its weights are pruned, beside random weights of the same counts."""

    scores: Path = Path("jaxmed-scores")
    """Folder of `prune score`."""
    out: Path = Path("jaxmed-curve")
    """Folder for curve.csv, examples.csv, curve.html and run.json."""
    tests: tuple[str, ...] = ("rude", "ordinary")
    """Examples files with responses, or bundled sets: the loss on each is measured before and after."""
    scored: str = ""
    """The behaviour set that was scored: the true rise of its loss is shown beside the first-order prediction."""
    qs: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Shares of weights that are chosen, instead of --q."""
    against: tuple[ScoreName, ...] = ("random",)
    """Other rules by which as many weights are chosen; random: the same counts per matrix."""
    seeds: int = 1
    """Draws of random masks with the same counts per matrix."""
    layers: str = ""  # type: ignore[assignment]
    """Layers whose matrices may be chosen from, such as 9,19,20-29; empty: all."""
    config: Config = None

    def run(self) -> None:
        """Selects, prunes in memory, measures, draws."""
        from jaxmed.pruning.curve import CURVE, CURVE_KEY, EXAMPLES, check_curve, check_scored, run_curve
        from jaxmed.pruning.measure import make_tests
        from jaxmed.pruning.scores import read_scores
        from jaxmed.pruning.tables import Examples, Table
        from jaxmed.reports.curves import write_pruning_curve

        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Rule)}
        given |= {"layers": parse_layers(self.layers) or ()}
        rule, scores, sets = Rule(**given), read_scores(self.scores), self.sets(self.tests)
        if self.scored:
            sets["scored"] = chosen(self.scored, "train", scores.examples.get("behaviour"))
        masks = len(self.qs) * (1 + sum(self.seeds if score == "random" else 1 for score in self.against))
        show.lines(f"prune curve: {self.model}", plan_lines(masks, sets, self.text))
        if self.dry_run:
            return
        model = load_model(self.model, self.dtype, None, self.mesh)
        tests = make_tests(model, sets, self.text, form=self.form)
        check_curve(model, scores, rule, self.qs, self.against)
        if self.scored:
            check_scored(scores, tests.sets["scored"])
        asked = self.manifest("scores", "tests", "scored", "seeds", "qs", "against") | {"rule": given, "scored_by": scores.digest}
        begin(self.out, self.resume, (CURVE, EXAMPLES), asked | {"contents": contents(sets, self.text)})
        with show.progress("curve", masks + 1, "masks") as report:
            table = Table(CURVE_KEY, self.out / CURVE, counted(report))
            resumed(table, report)
            examples = Examples(CURVE_KEY, self.out / EXAMPLES)
            run_curve(model, scores, tests, rule, self.qs, self.against, self.seeds, table, examples)
        show_rows(table.rows, CURVE_KEY, f"95 % intervals: {self.out / CURVE}")
        show.out.print(f"curve: {write_pruning_curve(self.out / CURVE, self.out / 'curve.html')}", markup=False)


@dataclass(frozen=True)
class Masked(Measuring):
    """Several masks."""

    masks: tuple[Path, ...] = ()
    """Mask files; their names name the rows."""

    def read(self) -> dict[str, Any]:
        """The masks by name."""
        from jaxmed.pruning import read_mask

        if not self.masks:
            raise UserError("Give at least one mask file: --masks A.safetensors B.safetensors.")
        masks = {file.stem: read_mask(file) for file in self.masks}
        if len(masks) < len(self.masks) or "none" in masks:
            raise UserError("Rows are named after the mask files: no two may have the same name, and none may be called 'none'.")
        return masks

    def checked(self, model: Any, masks: Mapping[str, Any]) -> Any:
        """The model, once every mask fits it."""
        from jaxmed.pruning.apply import check_mask

        for mask in masks.values():
            check_mask(model, mask)
        return model


@dataclass(frozen=True)
class Transfer(Masked):
    """Prunes for each of several behaviours, and tests every other one: a matrix of what is lost."""

    tests: tuple[str, ...] = ("rude", "ordinary")
    """Examples files with responses, or bundled sets: the loss on each is measured before and after."""
    out: Path = Path("jaxmed-transfer")
    """Folder for transfer.csv, transfer.html and run.json."""
    seeds: int = 1
    """Draws of random masks with the same counts per matrix."""
    config: Config = None

    def run(self) -> None:
        """Prunes in memory, measures, draws."""
        from jaxmed.pruning.curve import TRANSFER, TRANSFER_KEY, run_transfer
        from jaxmed.pruning.measure import make_tests
        from jaxmed.pruning.tables import Table
        from jaxmed.reports.curves import write_transfer

        masks, sets = self.read(), self.sets(self.tests)
        trials = len(masks) * (1 + self.seeds)
        show.lines(f"prune transfer: {self.model}", plan_lines(trials, sets, self.text))
        if self.dry_run:
            return
        model = self.checked(load_model(self.model, self.dtype, None, self.mesh), masks)
        asked = self.manifest("tests", "seeds") | {"masks": digests(masks), "contents": contents(sets, self.text)}
        begin(self.out, self.resume, (TRANSFER,), asked)
        tests = make_tests(model, sets, self.text, form=self.form)
        with show.progress("transfer", trials, "masks") as report:
            table = Table(TRANSFER_KEY, self.out / TRANSFER, counted(report))
            resumed(table, report)
            run_transfer(model, masks, tests, self.seeds, table)
        show_rows(table.rows, TRANSFER_KEY, f"95 % intervals: {self.out / TRANSFER}")
        show.out.print(f"transfer: {write_transfer(self.out / TRANSFER, self.out / 'transfer.html')}", markup=False)


@dataclass(frozen=True)
class Compression:
    """How many fewer weights carry a behaviour in an aligned model than in its base, from curves of both; runs no model."""

    base: tuple[Path, ...] = ()
    """--out folders of `prune curve` of the base model, one per behaviour."""
    aligned: tuple[Path, ...] = ()
    """The same of the aligned model, in the same order; for several models (stages of training), all folders of one, then of the next."""
    behaviours: tuple[str, ...] = ()
    """The test set of each folder that is its behaviour, in the same order."""
    control: str = ""
    """One of --behaviours whose compression is subtracted."""
    utility: float = 0.01
    """Rise of the perplexity, as a share, up to which a behaviour counts as halved without harm."""
    names: tuple[str, ...] = ()
    """Names of the models, the base first; default: those in the folders."""
    seed: int = 0
    """Of resamples."""
    out: Path = Path("jaxmed-compression")
    """Folder for compression.csv, compression.html and run.json."""
    config: Config = None

    def run(self) -> None:
        """Reads curves, compares, draws."""
        from jaxmed.pruning.compression import COMPRESSION, compression_rows
        from jaxmed.pruning.tables import write_rows
        from jaxmed.reports.curves import write_compression

        curves = self._curves()
        if self.control and self.control not in self.behaviours:
            raise UserError(f"The control {self.control!r} is none of --behaviours ({', '.join(self.behaviours)}).")
        folders = {"base": [str(one) for one in self.base], "aligned": [str(one) for one in self.aligned], "names": list(curves)}
        asked = {"behaviours": self.behaviours, "control": self.control, "utility": self.utility, "seed": self.seed}
        begin(self.out, False, (COMPRESSION,), asked | folders)
        rows = compression_rows(curves, next(iter(curves)), self.control, 1 + self.utility, seed=self.seed)
        write_rows(self.out / COMPRESSION, rows)
        show_compression(rows, self.control)
        show.out.print(f"compression: {write_compression(self.out / COMPRESSION, self.out / 'compression.html')}", markup=False)

    def _curves(self) -> dict[str, dict[str, Any]]:
        from jaxmed import results
        from jaxmed.pruning.compression import read_curve
        from jaxmed.pruning.curve import CURVE, EXAMPLES
        from jaxmed.pruning.tables import read_rows

        count = len(self.behaviours)
        if not count or len(self.base) != count or not self.aligned or len(self.aligned) % count:
            raise UserError("Give --behaviours, and a folder of `prune curve` for each of them in --base and for each model in --aligned.")
        folders = [self.base, *(self.aligned[at : at + count] for at in range(0, len(self.aligned), count))]
        if self.names and len(self.names) != len(folders):
            raise UserError(f"There are {len(self.names)} names for {len(folders)} models.")
        curves: dict[str, dict[str, Any]] = {}
        for number, held in enumerate(folders):
            for folder in held:
                if not (folder / CURVE).is_file():
                    raise UserError(f"{folder} holds no curve. Give --out folders of `jaxmed prune curve`.")
            for one, other in zip(self.base, held, strict=True):
                check_alike(one, other)
            name = self.names[number] if self.names else results.read_run(held[0])["manifest"]["model"]
            if name in curves:
                raise UserError(f"Two models are called {name!r}. Tell them apart with --names.")
            curves[name] = {
                behaviour: read_curve(read_rows(folder / CURVE), read_rows(folder / EXAMPLES), behaviour)
                for behaviour, folder in zip(self.behaviours, held, strict=True)
            }
        return curves


def check_alike(one: Path, other: Path) -> None:
    """Raises a UserError where two curves are not finished, or not of the same request but for the model."""
    from jaxmed import results
    from jaxmed.pruning.curve import CURVE
    from jaxmed.pruning.tables import read_rows

    found = [results.read_run(folder)["manifest"] for folder in (one, other)]
    for folder, manifest in zip((one, other), found, strict=True):
        missing = {float(q) for q in manifest["qs"]} - {float(row["q"]) for row in read_rows(folder / CURVE)}
        if missing:
            raise UserError(f"The curve in {folder} is not finished: q {sorted(missing)[0]:g} is missing. Continue it with --resume.")
    for key in ("tests", "split", "limit", "text", "form", "qs", "rule", "contents"):
        if found[0][key] != found[1][key]:
            raise UserError(f"The curves in {one} and {other} differ in {key!r}, so their models cannot be compared.")


def show_compression(rows: Sequence[Mapping[str, Any]], control: str) -> None:
    """Prints the table of a compression."""
    from rich.table import Table

    title = "q50: share q of chosen weights at which a behaviour is halved; compression: how much smaller it is (natural logarithm)"
    table = Table(title=title, title_justify="left")
    for column in ("model", "behaviour", "q50", "95 %", "perplexity there", "compression", f"minus {control}" if control else "", "95 %"):
        table.add_column(column)
    for row in rows:
        reached = {"yes": f"{row['q50']:.2e}", "at most": f"<= {row['q50']:.2e}", "no": "not reached"}[row["reached"]]
        cost = f"x {row['perplexity_at_q50']:.3f}" + " (above the limit)" * (row["within_limit"] == 0)
        cost = cost if row["within_limit"] != "" and row["reached"] != "no" else "-"
        cells = [row["model"], row["behaviour"], reached, between(row["q50_low"], row["q50_high"], ".2e"), cost]
        table.add_row(*cells, f"{row['compression']:+.2f}", f"{row['net']:+.2f}", between(row["net_low"], row["net_high"], "+.2f"))
    show.out.print(table)


def between(low: float, high: float, form: str) -> str:
    """An interval, or a dash where there is none."""
    return "-" if low != low or high != high else f"{low:{form}} to {high:{form}}"


def plan_lines(masks: int, sets: Mapping[str, Sequence[Any]], text: str) -> list[str]:
    """What will be measured, in words."""
    each = ", ".join(f"{len(found)} of {name}" for name, found in sets.items() if found)
    return [f"{masks} masks, each applied in memory; examples: {each}" + (f"; perplexity on {text}" if text else "")]


def begin(out: Path, resume: bool, tables: Sequence[str], manifest: Mapping[str, Any]) -> None:
    """Begins or continues a folder of tables and their figure.

    Raises:
        UserError: foreign files; a run without --resume, or of another request.
    """
    from jaxmed import results
    from jaxmed.provenance import versions

    html = tables[0].replace(".csv", ".html")
    names = {name + end for name in (results.RUN, html, *tables) for end in ("", ".tmp")}
    held = results.check_contents(out, resume, names)
    if results.RUN not in held and held & set(tables):
        raise UserError(
            f"--out {out} holds {min(held & set(tables))} without {results.RUN}, so nobody can say what it is of. Give a new folder."
        )
    if results.RUN in held:
        results.check_same(out, results.read_run(out)["manifest"], manifest)
        return
    out.mkdir(parents=True, exist_ok=True)
    results.write_json(out / results.RUN, {"manifest": dict(manifest), "versions": versions()})


def digests(masks: Mapping[str, Any]) -> dict[str, Any]:
    """What tells masks apart, for the record."""
    return {
        name: {"weights": mask.count, "rule": dict(mask.rule), "of": mask.weights, "sha256": mask.digest} for name, mask in masks.items()
    }


def contents(sets: Mapping[str, Sequence[Any]], text: str) -> str:
    """SHA-256 of the examples and the plain text that models are tested on."""
    from jaxmed.prompts.examples import digest
    from jaxmed.prompts.readers import read_text

    return digest([*(row for rows in sets.values() for row in rows)], read_text(text) if text else "")


def counted(report: Any) -> Callable[[Any], None]:
    """Advances a progress bar by one for every row."""
    return lambda row: report(1, 1, "")


def resumed(table: Any, report: Any) -> None:
    """Tells a progress bar what an earlier run has done."""
    if table.rows:
        report(len(table.rows), 0, "resumed")


def show_rows(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], note: str) -> None:
    """Prints a table of the rows: keys, weights, the rise of every loss, the perplexity's ratio, rates."""
    from rich.table import Table

    names = [column.removesuffix("_rise") for column in rows[0] if column.endswith("_rise")]
    others = {"first_order": "first order", "perplexity_ratio": "perplexity x", "detect_auc": "detect (AUC)", "refuse": "refuse"}
    others = {column: title for column, title in others.items() if column in rows[0]}
    table = Table(title=f"rise of the loss, nats per response token ({note})", title_justify="left")
    for column in (*keys, "weights", *names, *others.values()):
        table.add_column(column, justify="left" if column in keys else "right")
    for row in rows:
        cells = [f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        more = [f"{row[column]:+.3f}" if column == "first_order" else number(row[column]) for column in others]
        table.add_row(*cells, f"{int(row['weights']):,}", *(f"{row[f'{name}_rise']:+.3f}" for name in names), *more)
    show.out.print(table)


def number(value: Any) -> str:
    """Three decimals, or a dash where there is none."""
    return f"{value:.3f}" if isinstance(value, float) else "-"
