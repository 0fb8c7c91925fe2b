"""The commands `prune curve`, `prune transfer` and `prune compression`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.commands import Config, load_model
from jaxmed.cli.measuring import Masked, Measuring, begin, contents, digests, measure_table, plan_lines
from jaxmed.errors import UserError
from jaxmed.models.config import parse_layers
from jaxmed.prompts.examples import chosen
from jaxmed.pruning.rule import Rule

ScoreName = Literal["positive", "absolute", "wanda", "magnitude", "random", "signed"]


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
        from jaxmed.experiments.curve import CURVE, CURVE_KEY, EXAMPLES, check_curve, check_scored, run_curve
        from jaxmed.experiments.measure import make_tests
        from jaxmed.experiments.table import Examples
        from jaxmed.pruning.scores import read_scores
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
        with begin(self.out, self.resume, (CURVE, EXAMPLES), asked | {"contents": contents(sets, self.text)}):
            examples = Examples(CURVE_KEY, self.out / EXAMPLES)
            work = lambda table: run_curve(model, scores, tests, rule, self.qs, self.against, self.seeds, table, examples)  # noqa: E731
            measure_table("curve", masks + 1, "masks", CURVE_KEY, self.out / CURVE, work, write_pruning_curve)


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
        from jaxmed.experiments.curve import TRANSFER, TRANSFER_KEY, run_transfer
        from jaxmed.experiments.measure import make_tests
        from jaxmed.reports.curves import write_transfer

        masks, sets = self.read(), self.sets(self.tests)
        trials = len(masks) * (1 + self.seeds)
        show.lines(f"prune transfer: {self.model}", plan_lines(trials, sets, self.text))
        if self.dry_run:
            return
        model = self.checked(load_model(self.model, self.dtype, None, self.mesh), masks)
        asked = self.manifest("tests", "seeds") | {"masks": digests(masks), "contents": contents(sets, self.text)}
        with begin(self.out, self.resume, (TRANSFER,), asked):
            tests = make_tests(model, sets, self.text, form=self.form)
            work = lambda table: run_transfer(model, masks, tests, self.seeds, table)  # noqa: E731
            measure_table("transfer", trials, "masks", TRANSFER_KEY, self.out / TRANSFER, work, write_transfer)


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
        from jaxmed.experiments.compression import COMPRESSION, compression_rows
        from jaxmed.files import write_csv
        from jaxmed.reports.curves import write_compression

        curves = self._curves()
        if self.control and self.control not in self.behaviours:
            raise UserError(f"The control {self.control!r} is none of --behaviours ({', '.join(self.behaviours)}).")
        folders = {"base": [str(one) for one in self.base], "aligned": [str(one) for one in self.aligned], "names": list(curves)}
        asked = {"behaviours": self.behaviours, "control": self.control, "utility": self.utility, "seed": self.seed}
        with begin(self.out, False, (COMPRESSION,), asked | folders):
            rows = compression_rows(curves, next(iter(curves)), self.control, 1 + self.utility, seed=self.seed)
            write_csv(self.out / COMPRESSION, rows)
        show_compression(rows, self.control)
        show.out.print(f"compression: {write_compression(self.out / COMPRESSION, self.out / 'compression.html')}", markup=False)

    def _curves(self) -> dict[str, dict[str, Any]]:
        from jaxmed.experiments.compression import read_curve
        from jaxmed.experiments.curve import CURVE, EXAMPLES
        from jaxmed.experiments.table import read_rows
        from jaxmed.runs.folder import read_run

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
            name = self.names[number] if self.names else read_run(held[0])["manifest"]["model"]
            if name in curves:
                raise UserError(f"Two models are called {name!r}. Tell them apart with --names.")
            curves[name] = {
                behaviour: read_curve(read_rows(folder / CURVE), read_rows(folder / EXAMPLES), behaviour)
                for behaviour, folder in zip(self.behaviours, held, strict=True)
            }
        return curves


def check_alike(one: Path, other: Path) -> None:
    """Raises a UserError where two curves are not finished, or not of the same request but for the model."""
    from jaxmed.experiments.curve import CURVE
    from jaxmed.experiments.table import read_rows
    from jaxmed.runs.folder import read_run

    found = [read_run(folder)["manifest"] for folder in (one, other)]
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
