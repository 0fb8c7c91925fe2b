"""A study of targeted pruning in its folder: every part that is not there yet is measured and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path

from jaxmed.experiments.attacks import ATTACKS, run_attacks
from jaxmed.experiments.attacks import KEY as ATTACK_KEY
from jaxmed.experiments.compression import COMPRESSION, compression_rows, read_curve
from jaxmed.experiments.curve import CURVE_KEY, TRANSFER, TRANSFER_KEY, run_curve, run_transfer
from jaxmed.experiments.dissociation import DISSOCIATION, run_dissociation
from jaxmed.experiments.dissociation import KEY as ABILITY_KEY
from jaxmed.experiments.measure import Measured, Tests, make_tests, measure
from jaxmed.experiments.table import Examples, begin, continued, read_rows
from jaxmed.files import write_csv
from jaxmed.models.model import Model
from jaxmed.pruning.masks import Mask, read_mask, write_mask
from jaxmed.pruning.rule import Rule
from jaxmed.pruning.scores import Scores, check, read_scores, run
from jaxmed.pruning.selection import select
from jaxmed.runs.folder import Session
from jaxmed.runs.watch import Display
from jaxmed.studies.pruning import PruningStudy, short

Load = Callable[[str], Model]


class Run:
    """A study in its folder."""

    def __init__(self, study: PruningStudy, out: Path, load: Load, watch: Display):
        self.study, self.out, self.load, self.watch = study, out, load, watch

    def folder(self, *parts: str) -> Path:
        """A folder of the study, made if it is not there."""
        path = self.out.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def begin(self, resume: bool, dtype: str = "float32") -> AbstractContextManager[Session]:
        """Begins or continues the study's folder, and holds it inside the block.

        Raises:
            UserError: foreign files; a study without `resume`, or another one.
        """
        names = ("report.html", *(f"model{at}" for at in range(len(self.study.models))), TRANSFER, DISSOCIATION, ATTACKS, COMPRESSION)
        return begin(self.out, resume, names, names, {**self.study.manifest(), "dtype": dtype})

    def everything(self) -> None:
        """All steps; those that are finished are passed over."""
        study = self.study
        for number, name in enumerate(study.models):
            model = self.load(name)
            before = cache(partial(self.measure_all, model))
            scores = {source: self.score(model, number, source) for source in study.targets}
            for source in study.targets:
                self.curve(model, number, source, scores[source], before)
            if number == 0:
                self.transfer(model, self.masks(number, scores), before)
            if number == len(study.models) - 1:
                masks = {name: mask for name, mask in self.masks(number, scores).items() if name in self.examined}
                self.dissociation(model, masks)
                self.attacks(model, masks)
        self.compression()

    @property
    def examined(self) -> tuple[str, ...]:
        """The masks of dissociation and attacks: the first behaviour's and the first control's."""
        return tuple(short(source) for source in (*self.study.behaviours[:1], *self.study.controls[:1]))

    def score(self, model: Model, number: int, source: str) -> Scores:
        """Scores of a set; the preserve set is scored once, with the first one."""
        out = self.folder(f"model{number}") / f"scores-{short(source)}"
        preserve = self.study.scored(self.study.preserve) if source == self.study.targets[0] else []
        job = check(model, self.study.scored(source), preserve, kinds=self.study.kinds(source), form=self.study.form)
        with self.watch(f"{model.name}: scores of {short(source)}", job.batches, "examples") as report:
            scores = run(job, out, True, report)
        return scores

    def preserved(self, number: int) -> Scores:
        """The scores that hold the preserve set's."""
        return read_scores(self.out / f"model{number}" / f"scores-{short(self.study.targets[0])}")

    def masks(self, number: int, scores: Mapping[str, Scores]) -> dict[str, Mask]:
        """The masks at q, kept as files."""
        found = {}
        for source, held in scores.items():
            file = self.folder(f"model{number}", "masks") / f"{short(source)}.safetensors"
            if not file.is_file():
                rule = Rule(q=self.study.q, p=self.study.p)
                write_mask(select(held, rule, tag=short(source), preserve=self.preserved(number)), file)
            found[short(source)] = read_mask(file)
        return found

    def tests(self, model: Model, sources: Sequence[str]) -> Tests:
        """The held-out rows of some sets and of the preserve set, and the text."""
        sets = {short(one): self.study.tested(one) for one in (*sources, self.study.preserve)}
        return make_tests(model, sets, self.study.text, form=self.study.form)

    def measure_all(self, model: Model) -> Measured:
        """A model as it is, on everything."""
        return measure(model, self.tests(model, self.study.targets))

    def curve(self, model: Model, number: int, source: str, scores: Scores, before: Callable[[], Measured]) -> None:
        """The curve of a set, with baselines for the first behaviour."""
        study, first = self.study, source == self.study.behaviours[0]
        folder = self.folder(f"model{number}", f"curve-{short(source)}")
        against = study.against if first else ()
        masks = len(study.qs) * (1 + sum(study.seeds if name == "random" else 1 for name in against))
        tests = self.tests(model, [source])
        with self.watch(f"{model.name}: curve of {short(source)}", masks + 1, "masks") as report:
            table, examples = continued(CURVE_KEY, folder / "curve.csv", report), Examples(CURVE_KEY, folder / "examples.csv")
            rule = Rule(q=study.q, p=study.p)
            run_curve(model, scores, tests, rule, study.qs, against, study.seeds, table, examples, self.preserved(number), before)

    def transfer(self, model: Model, masks: Mapping[str, Mask], before: Callable[[], Measured]) -> None:
        """Every mask on every set."""
        study, tests = self.study, self.tests(model, self.study.targets)
        with self.watch(f"{model.name}: transfer", len(masks) * (1 + study.seeds), "masks") as report:
            run_transfer(model, masks, tests, study.seeds, continued(TRANSFER_KEY, self.out / TRANSFER, report), before)

    def dissociation(self, model: Model, masks: Mapping[str, Mask]) -> None:
        """What is left of four abilities."""
        with self.watch(f"{model.name}: dissociation", 1 + len(masks) * (1 + self.study.seeds), "masks") as report:
            table = continued(ABILITY_KEY, self.out / DISSOCIATION, report)
            run_dissociation(model, masks, self.study.abilities, self.study.seeds, table)

    def attacks(self, model: Model, masks: Mapping[str, Mask]) -> None:
        """Pruned models under attack."""
        count = 4 if self.study.refusals else 2
        with self.watch(f"{model.name}: attacks", (1 + len(masks)) * count, "models") as report:
            run_attacks(model, masks, self.study.attack, continued(ATTACK_KEY, self.out / ATTACKS, report))

    def compression(self) -> None:
        """q50 of every model and set, from the curves."""
        study, curves = self.study, {}
        for number, name in enumerate(study.models):
            folders = {short(source): self.out / f"model{number}" / f"curve-{short(source)}" for source in study.targets}
            curves[name] = {
                behaviour: read_curve(read_rows(folder / "curve.csv"), read_rows(folder / "examples.csv"), behaviour)
                for behaviour, folder in folders.items()
            }
        control = short(study.controls[0]) if study.controls else ""
        write_csv(self.out / COMPRESSION, compression_rows(curves, study.models[0], control, 1 + study.utility))
