"""A study of targeted pruning in its folder, and its list of steps: every part that is not there yet is measured and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from jaxmed.batching.texts import encode
from jaxmed.experiments.attacks import ATTACKS, run_attacks
from jaxmed.experiments.attacks import KEY as ATTACK_KEY
from jaxmed.experiments.compression import COMPRESSION, compression_rows, read_curve
from jaxmed.experiments.curve import CURVE_KEY, TRANSFER, TRANSFER_KEY, CurveRequest, run_curve, run_transfer
from jaxmed.experiments.dissociation import DISSOCIATION, run_dissociation
from jaxmed.experiments.dissociation import KEY as ABILITY_KEY
from jaxmed.experiments.measure import Measurement, Tests, make_tests, measure
from jaxmed.experiments.table import Examples, begin, continued, read_rows
from jaxmed.files import write_csv
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.prompts.readers import read_text
from jaxmed.pruning.job import make_job
from jaxmed.pruning.masks import Mask, read_mask, write_mask
from jaxmed.pruning.rule import Rule
from jaxmed.pruning.scores import Scores, read_scores, run_job
from jaxmed.pruning.selection import select
from jaxmed.runs.cost import Cost
from jaxmed.runs.folder import Session
from jaxmed.runs.watch import Display
from jaxmed.studies.pruning import PruningStudy, short
from jaxmed.studies.steps import Step
from jaxmed.tokens import text_ids


class PruningFolder:
    """A study in its folder.

    Attributes:
        load: number of a model -> the model; called once for each, and the one before is let go.
    """

    def __init__(self, study: PruningStudy, out: Path, load: Callable[[int], Model], watch: Display):
        self.study, self.out, self.load, self.watch = study, out, load, watch
        self._held: tuple[int, Model] | None = None
        self._before: Measurement | None = None

    def model(self, number: int) -> Model:
        """A model of the study."""
        if self._held is None or self._held[0] != number:
            self._held = self._before = None
            self._held = number, self.load(number)
        return self._held[1]

    def before(self, number: int) -> Measurement:
        """What a model as it is measures on everything."""
        model = self.model(number)
        self._before = self._before or measure(model, self.tests(model, self.study.targets))
        return self._before

    def folder(self, *parts: str) -> Path:
        """A folder of the study, made if it is not there."""
        path = self.out.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def begin(self, resume: bool, how: Mapping[str, Any]) -> AbstractContextManager[Session]:
        """Begins or continues the study's folder, and holds it inside the block; `how` is how models are loaded.

        Raises:
            UserError: foreign files; a study without `resume`, or another one.
        """
        names = ("report.html", *(f"model{at}" for at in range(len(self.study.models))), TRANSFER, DISSOCIATION, ATTACKS, COMPRESSION)
        return begin(self.out, resume, names, names, {**self.study.manifest(), **how})

    def score(self, number: int) -> None:
        """Scores of every set; those of the preserve set come with the first one."""
        study, model = self.study, self.model(number)
        for source in study.targets:
            out = self.folder(f"model{number}") / f"scores-{short(source)}"
            preserve = study.scored(study.preserve) if source == study.targets[0] else []
            job = make_job(model, study.scored(source), preserve, kinds=study.kinds(source), form=study.form)
            with self.watch(f"{model.name}: scores of {short(source)}", job.batches, "examples") as report:
                run_job(job, out, True, report)

    def scores(self, number: int, source: str) -> Scores:
        """The scores of a set."""
        return read_scores(self.out / f"model{number}" / f"scores-{short(source)}")

    def masks(self, number: int, names: Sequence[str] = ()) -> dict[str, Mask]:
        """The masks at q, kept as files; `names`: those of these sets alone."""
        found = {}
        for source in self.study.targets:
            if names and short(source) not in names:
                continue
            file = self.folder(f"model{number}", "masks") / f"{short(source)}.safetensors"
            if not file.is_file():
                rule, preserve = Rule(q=self.study.q, p=self.study.p), self.scores(number, self.study.targets[0])
                write_mask(select(self.scores(number, source), rule, tag="behaviour", preserve=preserve), file)
            found[short(source)] = read_mask(file)
        return found

    def tests(self, model: Model, sources: Sequence[str]) -> Tests:
        """The held-out rows of some sets and of the preserve set, and the text."""
        sets = {short(one): self.study.tested(one) for one in (*sources, self.study.preserve)}
        return make_tests(model, sets, self.study.text, form=self.study.form)

    def curves(self, number: int) -> None:
        """The curve of every set, with baselines for the first behaviour."""
        study, model = self.study, self.model(number)
        for source in study.targets:
            folder = self.folder(f"model{number}", f"curve-{short(source)}")
            against = study.against if source == study.behaviours[0] else ()
            preserve = self.scores(number, study.targets[0])
            rule = Rule(q=study.q, p=study.p)
            request = CurveRequest(self.scores(number, source), rule, study.qs, against, study.seeds, preserve)
            with self.watch(f"{model.name}: curve of {short(source)}", request.count + 1, "masks") as report:
                table, examples = continued(CURVE_KEY, folder / "curve.csv", report), Examples(CURVE_KEY, folder / "examples.csv")
                run_curve(model, request, self.tests(model, [source]), table, examples, partial(self.before, number))

    def transfer(self, number: int) -> None:
        """Every mask on every set."""
        study, model, masks = self.study, self.model(number), self.masks(number)
        with self.watch(f"{model.name}: transfer", len(masks) * (1 + study.seeds), "masks") as report:
            table = continued(TRANSFER_KEY, self.out / TRANSFER, report)
            run_transfer(model, masks, self.tests(model, study.targets), study.seeds, table, partial(self.before, number))

    def dissociation(self, number: int) -> None:
        """What is left of four abilities."""
        study, model, masks = self.study, self.model(number), self.masks(number, self.study.examined)
        with self.watch(f"{model.name}: dissociation", 1 + len(masks) * (1 + study.seeds), "masks") as report:
            table = continued(ABILITY_KEY, self.out / DISSOCIATION, report)
            run_dissociation(model, masks, study.abilities, study.seeds, table)

    def attacks(self, number: int) -> None:
        """Pruned models under attack."""
        study, model, masks = self.study, self.model(number), self.masks(number, self.study.examined)
        with self.watch(f"{model.name}: attacks", (1 + len(masks)) * len(study.attack.names), "models") as report:
            run_attacks(model, masks, study.attack, continued(ATTACK_KEY, self.out / ATTACKS, report))

    def compression(self) -> None:
        """q50 of every model and set, from the curves."""
        study, curves = self.study, {}
        for number, name in enumerate(study.labels):
            folders = {short(source): self.out / f"model{number}" / f"curve-{short(source)}" for source in study.targets}
            curves[name] = {
                behaviour: read_curve(read_rows(folder / "curve.csv"), read_rows(folder / "examples.csv"), behaviour)
                for behaviour, folder in folders.items()
            }
        control = short(study.controls[0]) if study.controls else ""
        write_csv(self.out / COMPRESSION, compression_rows(curves, study.labels[0], control, 1 + study.utility))


def pruning_steps(study: PruningStudy, model: Model) -> list[Step]:
    """The steps of a study, model by model, with what they cost by this model's config and tokenizer (its weights are not needed)."""
    work, steps = _work(study, model), []
    written = {"score": study.score_bytes(model.config)}

    def add(kind: str, title: str, number: int, *needs: str) -> str:
        """A step of one model; returns its name."""
        passes, tokens = work[kind]
        name = f"{study.labels[number]}: {title}"
        cost = Cost(name, passes * tokens * token_flops(model.config), passes, written=written.get(kind, 0))
        steps.append(Step(name, needs, cost, lambda folder: getattr(folder, kind)(number)))
        return name

    sets, masks, last, curves = len(study.targets), len(study.examined), len(study.labels) - 1, []
    for number in range(last + 1):
        scores = add("score", f"scores of {sets + 1} sets", number)
        curves.append(add("curves", f"curves over {len(study.qs)} fractions of {sets} sets", number, scores))
        if number == 0:
            add("transfer", f"transfer of {sets} masks", number, scores)
        if number == last:
            add("dissociation", f"dissociation of {masks} masks", number, scores)
            add("attacks", f"attacks on {masks + 1} models", number, scores)
    name = "compression, from the curves"
    return [*steps, Step(name, tuple(curves), Cost(name), PruningFolder.compression)]


def token_flops(config: ModelConfig) -> float:
    """Matmul FLOPs of the weights in one forward of one token."""
    return 2.0 * (config.layers * config.layer_weights + config.vocabulary * config.width)


def _work(study: PruningStudy, model: Model) -> dict[str, tuple[float, int]]:
    """Kind of step -> forwards, and the tokens of each."""

    def size(rows: Sequence[Any]) -> int:
        return sum(len(one.ids) for one in encode(model.tokenizer, rows, study.form)) if rows else 0

    text = len(text_ids(model.tokenizer, read_text(study.text))) if study.text else 0
    scored = sum(size(study.scored(source)) for source in (*study.targets, study.preserve))
    tested = {source: size(study.tested(source)) for source in (*study.targets, study.preserve)}
    baselines = len(study.qs) * sum(study.seeds if name == "random" else 1 for name in study.against)
    behaviour, preserve = tested[study.behaviours[0]], tested[study.preserve]
    curves = sum(tested.values()) + text + len(study.qs) * sum(tested[source] + preserve + text for source in study.targets)
    curves += baselines * (behaviour + preserve + text)
    abilities, examined = study.abilities, len(study.examined)
    asked = 40 * (len(abilities.twins) + len(abilities.behaviour)) + (40 + study.tokens) * len(abilities.requests)
    each = behaviour + preserve + text + size(abilities.explanations) + asked
    attacked = 2 * behaviour + text + (40 + study.tokens) * len(abilities.requests)
    attack = study.attack
    training = attacked + round(3 * attack.training.epochs * size(attack.trained)) if attack.trained else 0
    removal = 3 * (size(attack.refusals) + size(attack.preserve)) + training
    return {
        "score": (3, scored),
        "curves": (1, curves),
        "transfer": (len(study.targets) * (1 + study.seeds), sum(tested.values()) + text),
        "dissociation": (1 + examined * (1 + study.seeds), each),
        "attacks": (examined + 1, attacked * (2 if study.refusals else 1) + removal),
    }
