"""The commands `probe search` and `probe fit`: a read-out is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jaxmed.cli import show
from jaxmed.cli.flags import FormFlag, LogFlag, ModelFlags, PlanFlags, TrainSplitFlag, check_absent
from jaxmed.cli.labelled import LabelledFlags, ids_of, longest
from jaxmed.errors import UserError, notice
from jaxmed.probing.spec import FitSpec, SearchSpec


@dataclass(frozen=True, kw_only=True)
class ProbeSearch(TrainSplitFlag, LabelledFlags, ModelFlags, FormFlag, LogFlag, PlanFlags, SearchSpec):
    """Searches the openings of answers that benign prompts make likelier than harmful ones (agreement), and the reverse (refusal)."""

    prompts: int = 48
    """Prompts of each kind at most, drawn at random."""
    out: Path = Path("prefixes.json")
    """JSON file for the openings."""

    def run(self) -> None:
        """Checks, plans, searches, prints."""
        from jaxmed.probing.prefixes import write_prefixes
        from jaxmed.probing.search import search

        check_absent(self.out)
        spec = SearchSpec(**{one.name: getattr(self, one.name) for one in fields(SearchSpec)})
        spec.check()
        sides = self.labelled(self.split)
        model = self.describe()
        benign, harmful = ids_of(model, sides, self.form, spec.length)
        total = sum(map(len, sides)) * 2 * (1 + spec.beams * (spec.length - 1))
        lines = [
            f"{len(sides[0])} benign and {len(sides[1])} harmful prompts of {self.examples}",
            f"{spec.length} tokens, {spec.beams} beams of each kind: up to {total:,} (prompt, opening); a prompt runs once per length",
        ]
        show.lines(f"probe search: {model.name}", lines)
        if self.dry_run:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        model = self.load()
        with show.progress("openings", total, "openings") as report:
            found = search(model, benign, harmful, spec, self.form, lambda done: report(done, done, ""))
        write_prefixes(self.out, found, model=model.record, search={**asdict(spec), "prompts": [len(side) for side in sides]})
        rows = [[one.kind, repr(one.text), *_numbers(one)] for one in found.prefixes]
        show.table("openings", ["kind", "opening", "gap", "benign", "harmful"], rows, left=2)
        show.out.print(f"prefixes: {self.out} (nats per token; gap: benign minus harmful)", markup=False)


def _numbers(one: Any) -> list[str]:
    return [f"{one.found[0] - one.found[1]:+.3f}", f"{one.found[0]:.3f}", f"{one.found[1]:.3f}"]


@dataclass(frozen=True, kw_only=True)
class ProbeFit(TrainSplitFlag, LabelledFlags, ModelFlags, FormFlag, LogFlag, PlanFlags, FitSpec):
    """Fits a probe to labelled prompts: standardises the score, sets the threshold, and tests both fold by fold."""

    prefixes: Path | None = None
    """JSON file of `jaxmed probe search`; default: six openings written by hand."""
    out: Path = Path("probe.json")
    """JSON file for the probe."""

    def run(self) -> None:
        """Checks, plans, fits, prints."""
        from jaxmed.probing.prefixes import by_hand, check_prefixes, read_prefixes
        from jaxmed.probing.probe import check_counts, fit, write_probe

        check_absent(self.out)
        spec = FitSpec(**{one.name: getattr(self, one.name) for one in fields(FitSpec)})
        spec.check()
        model = self.describe()
        prefixes = by_hand(model, self.form) if self.prefixes is None else check_prefixes(model, read_prefixes(self.prefixes))
        if self.prefixes is not None and self.form not in ("chat", prefixes.form):
            raise UserError(f"The openings of {self.prefixes} stand behind prompts of the form {prefixes.form}, not {self.form}.")
        sides = self._not_searched(model, prefixes, self.labelled(self.split, spec.seed))
        check_counts(len(sides[0]), len(sides[1]), spec)
        total = sum(map(len, sides)) * len(prefixes.prefixes)
        benign, harmful = ids_of(model, sides, prefixes.form, longest(prefixes))
        show.lines(
            f"probe fit: {model.name}",
            [f"{len(sides[0])} benign and {len(sides[1])} harmful prompts of {self.examples}, {len(prefixes.prefixes)} openings"],
        )
        if self.dry_run:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        model = self.load()
        with show.progress("scores", total, "openings") as report:
            found = fit(model, benign, harmful, prefixes, spec, lambda done: report(done, done, ""))
        write_probe(self.out, found)
        of = found.fitted
        lines = [
            f"AUC {of['auc']:.3f} over {of['folds']} folds",
            f"at {spec.fpr:g} of the benign prompts of the other folds: flags {of['held_out_tpr']:.1%} of harmful prompts and "
            f"{of['held_out_fpr']:.1%} of benign ones",
            f"probe: {self.out}",
        ]
        show.lines("fitted", lines)

    def _not_searched(self, model: Any, prefixes: Any, sides: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The examples whose prompts the openings were not searched in: those would not test them."""
        from jaxmed.probing.prefixes import prompt_digest

        kept = [
            [row for row, ids in zip(side, ids, strict=True) if prompt_digest(ids) not in prefixes.searched]
            for side, ids in zip(sides, ids_of(model, sides, prefixes.form), strict=True)
        ]
        if left := sum(map(len, sides)) - sum(map(len, kept)):
            notice(f"{left} prompts are left out of the fit: the openings were searched in them.")
        return kept
