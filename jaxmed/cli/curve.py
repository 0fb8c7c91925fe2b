"""The commands `prune curve` and `prune transfer`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from jaxmed.cli import show
from jaxmed.cli.mask import rule_of
from jaxmed.cli.measure import MaskFlags, MeasureFlags, begin, contents, digests, measure_table, plan_lines
from jaxmed.experiments.specs import SeedsSpec
from jaxmed.prompts.examples import chosen
from jaxmed.pruning.rule import Rule, ScoreName


@dataclass(frozen=True, kw_only=True)
class TestFlags:
    """What is tested."""

    tests: tuple[str, ...] = ("rude", "ordinary")
    """Examples files with responses, or bundled sets: the loss on each is measured before and after."""


@dataclass(frozen=True, kw_only=True)
class Curve(MeasureFlags, TestFlags, SeedsSpec, Rule):
    """What a behaviour and everything else lose as more of its weights are pruned, beside random weights of the same counts."""

    scores: Path = Path("jaxmed-scores")
    """Folder of `jaxmed prune score`."""
    out: Path = Path("jaxmed-curve")
    """Folder for curve.csv, examples.csv, curve.html and run.json."""
    scored: str = ""
    """Behaviour set that was scored: the true rise of its loss is shown beside the first-order prediction; empty: none."""
    qs: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Fractions of weights that are chosen, instead of --q."""
    against: tuple[ScoreName, ...] = ("random",)
    """Other rules by which as many weights are chosen; random: the same counts per matrix."""

    def run(self) -> None:
        """Selects, prunes in memory, measures, draws."""
        from jaxmed.experiments.curve import CURVE, CURVE_KEY, EXAMPLES, CurveRequest, check_scored, run_curve
        from jaxmed.experiments.measure import make_tests
        from jaxmed.experiments.table import Examples
        from jaxmed.pruning.scores import read_scores
        from jaxmed.reports.curves import write_pruning_curve

        scores, sets = read_scores(self.scores), self.sets(self.tests)
        request = CurveRequest(scores, rule_of(self), self.qs, self.against, self.seeds)
        if self.scored:
            sets["scored"] = chosen(self.scored, "train", scores.examples.get("behaviour"))
        model = self.describe()
        request.check(model)
        tests = make_tests(model, sets, self.text, form=self.form)
        if self.scored:
            check_scored(scores, tests.sets["scored"])
        show.lines(f"prune curve: {self.model}", plan_lines(request.count, sets, self.text))
        if self.dry_run:
            return
        asked = self.manifest(model, "scores", "tests", "scored", "seeds", "qs", "against") | {"rule": asdict(request.rule)}
        asked |= {"scored_by": scores.digest, "contents": contents(sets, self.text)}
        with begin(self.out, self.resume, (CURVE, EXAMPLES), asked):
            work = partial(run_curve, self.load(), request, tests, examples=Examples(CURVE_KEY, self.out / EXAMPLES))
            measure_table("curve", request.count + 1, "masks", CURVE_KEY, self.out / CURVE, work, write_pruning_curve)


@dataclass(frozen=True, kw_only=True)
class Transfer(MaskFlags, TestFlags, SeedsSpec):
    """Prunes for each of several behaviours, and tests every other one: a matrix of what is lost."""

    out: Path = Path("jaxmed-transfer")
    """Folder for transfer.csv, transfer.html and run.json."""

    def run(self) -> None:
        """Prunes in memory, measures, draws."""
        from jaxmed.experiments.curve import TRANSFER, TRANSFER_KEY, run_transfer
        from jaxmed.experiments.measure import make_tests
        from jaxmed.reports.curves import write_transfer

        masks, sets = self.read(), self.sets(self.tests)
        model = self.checked(masks)
        tests = make_tests(model, sets, self.text, form=self.form)
        trials = len(masks) * (1 + self.seeds)
        show.lines(f"prune transfer: {self.model}", plan_lines(trials, sets, self.text))
        if self.dry_run:
            return
        asked = self.manifest(model, "tests", "seeds") | {"masks": digests(masks), "contents": contents(sets, self.text)}
        with begin(self.out, self.resume, (TRANSFER,), asked):
            work = partial(run_transfer, self.load(), masks, tests, self.seeds)
            measure_table("transfer", trials, "masks", TRANSFER_KEY, self.out / TRANSFER, work, write_transfer)
