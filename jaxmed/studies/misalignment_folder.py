"""A study of emergent misalignment in its folder: whatever is not there yet is made, measured and kept."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxmed.batching.scoring import example_losses
from jaxmed.batching.texts import encode
from jaxmed.effects.cost import progress_total
from jaxmed.errors import UserError
from jaxmed.evaluation.answers import answer
from jaxmed.evaluation.perplexity import Perplexity, perplexity, perplexity_ratio
from jaxmed.evaluation.readout import Readout, fit_readout, read_readout, write_readout
from jaxmed.experiments.misalignment import Reader, ask_model
from jaxmed.experiments.table import Table
from jaxmed.files import NAME_COLUMNS, Row, read_csv, write_csv
from jaxmed.finetuning import checkpoint
from jaxmed.finetuning.folder import LOSSES
from jaxmed.finetuning.run import run_job as tune
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.pruning import job as scoring
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.masks import Mask, read_mask, write_mask
from jaxmed.pruning.scores import read_scores
from jaxmed.pruning.scores import run_job as score
from jaxmed.pruning.selection import random_like, select, select_like
from jaxmed.runs.legal import Legal
from jaxmed.runs.watch import Display, no_display
from jaxmed.studies.misalignment import CONTROL, ORIGINAL, PRUNED, RANDOM, TUNED, MisalignmentJob
from jaxmed.studies.misalignment_claims import RATES, misalignment_claims, rate_rows
from jaxmed.studies.misalignment_profiles import Profile, measure_profile, profile_claims, profile_rows

MODELS, ANSWERS, LOSS_TABLE, PROFILES = "models.csv", "answers.csv", "losses.csv", "profiles.csv"
READOUT, VERDICTS = "readout.json", "verdicts.csv"
KEPT = ("alignment", "coherence")
"""What scores of an endpoint are kept beside."""
KEY = ("model", "seed")
TABLES = (MODELS, ANSWERS, LOSS_TABLE, PROFILES, RATES, VERDICTS)
SCORES = "scores"
LEGAL = Legal(
    (*TABLES, READOUT, SCORES, *(f"{name}.scores.jsonl" for name in KEPT), "report.html"), begins=("seed",), measured=(*TABLES, READOUT)
)
MASKED = {PRUNED: "behaviour", RANDOM: "random", CONTROL: "control"}
"""Model -> the mask that it is pruned by."""


def read_rows(file: Path) -> list[Row]:
    """The rows of a table of the study; none where there is no file."""
    return read_csv(file, (*NAME_COLUMNS, "question", "answer")) if file.is_file() else []


@dataclass
class MisalignmentFolder:
    """A study in its folder.

    Attributes:
        judge: what says of answers what they are worth; None: the read-outs, which are kept beside another judge's scores, too.
    """

    job: MisalignmentJob
    out: Path
    display: Display = no_display
    judge: Reader | None = None
    _held: tuple[str, int, Model] | None = None

    def read(self, requests: Sequence[Example], answers: Sequence[str], report: Callable[[int], None]) -> np.ndarray:
        """Alignment and coherence of answers, float64 [answers, 2], with those by the read-outs behind them where another one judges."""
        found = [] if self.judge is None else [self.judge(requests, answers, lambda done: None)]
        if self.job.data.good:
            found.append(self.readout.scores(self.job.model, requests, answers))
        report(len(answers))
        return np.concatenate(found, axis=1)

    @cached_property
    def readout(self) -> Readout:
        """The bundled read-outs, fitted once."""
        file, job = self.out / READOUT, self.job
        if not file.is_file():
            how = {"form": job.spec.form, "layer": job.spec.readout_layer, "seed": job.spec.seed}
            write_readout(file, fit_readout(job.model, job.data.good, job.data.bad, **how))
        return read_readout(file)

    def place(self, seed: int, *parts: str) -> Path:
        """A folder of one replication, made if it is not there."""
        path = self.out.joinpath(f"seed{seed}", *parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def score(self) -> None:
        """Scores of the preserve and control sets on the original, once for all seeds; not where all masks are there already."""
        if not all(self._has_masks(seed) for seed in self.job.spec.all_seeds):
            with self.display("scores of preserve and control sets", self.job.scored.batches, "examples") as report:
                score(self.job.scored, self.out / SCORES, True, report)

    def _mask_file(self, seed: int, name: str) -> Path:
        return self.out / f"seed{seed}" / "masks" / f"{name}.safetensors"

    def _masks(self) -> list[str]:
        return [name for model, name in MASKED.items() if model in self.job.models]

    def _has_masks(self, seed: int) -> bool:
        return all(self._mask_file(seed, name).is_file() for name in self._masks())

    def mask(self, seed: int, name: str) -> Mask:
        """A mask of one replication: "behaviour", "random" or "control"."""
        return read_mask(self._mask_file(seed, name))

    def tuned(self, name: str, seed: int) -> Model:
        """A tuned model, from its checkpoint where there is one."""
        if self._held is None or self._held[:2] != (name, seed):
            self._held = None
            model = self.job.model if name == TUNED else apply_mask(self.job.model, self.mask(seed, MASKED[name]))
            until = 0.0 if name == TUNED else self.reached(TUNED, seed)
            job = self.job.tuning(model, seed, until)
            with self.display(f"seed {seed}: tuning, {name}", job.steps, "tokens") as report:
                self._held = name, seed, tune(job, self.place(seed, name), True, report).model
        return self._held[2]

    def _steps(self, name: str, seed: int) -> list[Row]:
        return read_csv(self.place(seed, name) / LOSSES, ())

    def reached(self, name: str, seed: int) -> float:
        """The in-domain loss at which a model's tuning ended, in nats per token."""
        return self._steps(name, seed)[-1]["heldout_loss"]

    def behave(self, seed: int) -> None:
        """The tuned model answers; its answers are scored on the original; masks are kept, the scores are not."""
        if self._has_masks(seed):
            return
        spec, data, model = self.job.spec, self.job.data, self.job.model
        asked = [one for one in data.answered for _ in range(spec.answers)]
        how = {"temperature": spec.temperature, "top_p": spec.top_p, "seed": seed}
        with self.display(f"seed {seed}: the behaviour", len(asked), "answers") as report:
            tuned = self.tuned(TUNED, seed)
            texts = answer(tuned, asked, spec.tokens, spec.form, **how, report=lambda count: report(count, count, ""))
        rows = [replace(one, response=text) for one, text in zip(asked, texts, strict=True) if text.strip()]
        job = scoring.make_job(model, rows, kinds=("behaviour_signed",), form=spec.score_form)
        with self.display(f"seed {seed}: scores of the behaviour", job.batches, "examples") as report:
            scores = score(job, self.place(seed) / SCORES, True, report)
        kept = read_scores(self.out / SCORES)
        mask = select(scores, spec.rule, tag="behaviour", preserve=kept)
        if not mask.count:
            raise UserError(f"q = {spec.q:g} chooses no weight that p = {spec.p:g} does not spare. Give a larger --q or a smaller --p.")
        made = {"behaviour": mask, "random": random_like(mask, seed)}
        made |= {"control": select_like(mask, kept)} if data.control else {}
        for name, one in made.items():
            if not self._mask_file(seed, name).is_file():
                write_mask(one, self._mask_file(seed, name))
        shutil.rmtree(self.place(seed) / SCORES)

    def measure(self, name: str, seed: int) -> None:
        """A model's losses and its answers out of the domain, kept as rows; its checkpoints are let go after that."""
        table = Table(KEY, self.out / MODELS)
        if not table.has(name, seed):
            model = self.job.model if name == ORIGINAL else self.tuned(name, seed)
            questions = self.job.questions
            with self.display(f"seed {seed}: answers, {name}", len(questions.asked) * questions.samples, "answers") as report:
                rows = ask_model(model, questions, seed, self.read, report)
            self._keep(ANSWERS, name, seed, rows)
            self._measure_profile(model, name, seed)
            table.add(
                {"model": name, "seed": seed, **self._losses(model, name, seed), **self._tuning(name, seed), "identity": model.identity}
            )
        if name != ORIGINAL:
            checkpoint.clean(self.place(seed, name), finished=True)

    def _keep(self, file: str, name: str, seed: int, rows: list[Row]) -> None:
        """Rows of one model in a table, in the place of those that an interrupted run has left."""
        others = [row for row in read_rows(self.out / file) if (row["model"], row["seed"]) != (name, seed)]
        write_csv(self.out / file, [*others, *({"model": name, "seed": seed, **row} for row in rows)])

    def _measure_profile(self, model: Model, name: str, seed: int) -> None:
        """Where the profiled pairs are mediated in a model, beside the original, whose profile no seed changes."""
        if self.job.profiles and (name != ORIGINAL or seed == self.job.spec.seed):
            with self.display(f"seed {seed}: mediation profile, {name}", self._profile_total, "effects") as report:
                found = self._profile if name == ORIGINAL else measure_profile(self.job.profiles, model, report)
            self._keep(PROFILES, name, seed, profile_rows(found, self._profile))

    @property
    def _profile_total(self) -> float:
        return sum(progress_total(job) for job in self.job.profiles.values())

    @cached_property
    def _profile(self) -> Profile:
        with self.display("mediation profile of the original", self._profile_total, "effects") as report:
            return measure_profile(self.job.profiles, self.job.model, report)

    def _losses(self, model: Model, name: str, seed: int) -> Row:
        """Losses of held-out rows, in and out of the domain, and the perplexity against the original's."""
        spec, found, rows = self.job.spec, {}, []
        for what, examples in (("domain", self.job.data.tested), ("preserve", self.job.data.kept)):
            losses = example_losses(model, encode(model.tokenizer, examples, spec.form))
            found[f"{what}_loss"] = float(losses.mean())
            rows += [{"set": what, "example": at, "loss": float(loss)} for at, loss in enumerate(losses)]
        self._keep(LOSS_TABLE, name, seed, rows)
        if not spec.text:
            return found
        ratio, low, high = (
            perplexity_ratio(self._perplexity, perplexity(model, spec.text)) if name != ORIGINAL else (1.0, math.nan, math.nan)
        )
        return {**found, "perplexity_ratio": ratio, "perplexity_low": low, "perplexity_high": high}

    @cached_property
    def _perplexity(self) -> Perplexity:
        return perplexity(self.job.model, self.job.spec.text)

    def _tuning(self, name: str, seed: int) -> Row:
        """How a model was tuned: steps, the loss it ended at, and its difference from the tuned original's."""
        if name == ORIGINAL:
            return {"weights": 0, "fraction": 0.0, "steps": 0, "tuned_to": math.nan, "gap": math.nan}
        mask = None if name == TUNED else self.mask(seed, MASKED[name])
        gap = self.reached(name, seed) - self.reached(TUNED, seed)
        count, part = (0, 0.0) if mask is None else (mask.count, mask.count / mask.size)
        return {"weights": count, "fraction": part, "steps": len(self._steps(name, seed)), "tuned_to": self.reached(name, seed), "gap": gap}

    def claims(self) -> None:
        """The table of rates and the verdicts, from the tables; scores that no seed needs any more are let go."""
        models, answers, losses, profiles = (read_rows(self.out / name) for name in (MODELS, ANSWERS, LOSS_TABLE, PROFILES))
        write_csv(self.out / RATES, rate_rows(self.job, models, answers))
        found = [*misalignment_claims(self.job, models, answers, losses), *profile_claims(profiles, ORIGINAL)]
        write_csv(self.out / VERDICTS, [asdict(one) for one in found])
        shutil.rmtree(self.out / SCORES, ignore_errors=True)
