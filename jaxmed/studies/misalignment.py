"""The study of emergent misalignment (after Orgad et al. 2026) before it runs: its data, everything that can be refused, and its plan.

For every seed: the original model is fine-tuned on a narrow set; the tuned model answers held-out prompts of that set; these answers are
the behaviour that the weights of the original are scored for; the original is pruned, and tuned on the narrow set until its in-domain loss
is that of the tuned original. Beside it stand models pruned at random and for another behaviour, with the same counts per matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxmed.batching.texts import encode
from jaxmed.effects import job as sweeping
from jaxmed.effects.cost import plan
from jaxmed.errors import UserError
from jaxmed.evaluation.answers import check_answers
from jaxmed.evaluation.readout import SPOILT
from jaxmed.experiments.misalignment import VARIANTS, Questions, make_asked
from jaxmed.finetuning import job as tuning
from jaxmed.models.model import Model
from jaxmed.models.named_weights import matrix_shapes
from jaxmed.prompts.examples import HELDOUT, Example, chosen, digest, read_examples
from jaxmed.prompts.pair import PromptPair
from jaxmed.prompts.readers import read_pairs, read_text
from jaxmed.pruning import job as scoring
from jaxmed.studies.misalignment_profiles import profile_jobs
from jaxmed.studies.misalignment_spec import MisalignmentSpec
from jaxmed.tokens import render, text_ids

ORIGINAL, TUNED, PRUNED, RANDOM, CONTROL = "original", "tuned", "pruned", "random", "control"
"""Models: as it is; tuned; and pruned for the behaviour, at random, and for the control, each tuned after that."""


@dataclass(frozen=True)
class MisalignmentData:
    """What a study reads.

    Attributes:
        trained: the narrow set's rows that models are tuned on.
        answered: held-out prompts of it, which the tuned model answers.
        tested: other held-out rows of it, for the in-domain loss.
        preserve, control: rows that are scored; `control` may be empty.
        kept: held-out rows of the preserve set, whose loss is measured.
        questions: rows out of the domain.
        profiled: pairs whose mediation profile is measured; may be empty.
        good, bad: rows that the read-out of alignment learns from; empty where another judge reads.
    """

    trained: Sequence[Example]
    answered: Sequence[Example]
    tested: Sequence[Example]
    preserve: Sequence[Example]
    control: Sequence[Example]
    kept: Sequence[Example]
    questions: Sequence[Example]
    profiled: Sequence[PromptPair] = ()
    good: Sequence[Example] = ()
    bad: Sequence[Example] = ()


def read_data(spec: MisalignmentSpec) -> MisalignmentData:
    """The data that a spec names.

    Raises:
        UserError: what the files raise; one held-out row alone.
    """
    held = chosen(spec.narrow, HELDOUT, spec.heldout_limit)
    if len(held) < 2:
        raise UserError(f"{spec.narrow} has one held-out row; at least two are needed: one half is answered, the other tested.")
    half = len(held) // 2
    return MisalignmentData(
        trained=chosen(spec.narrow, "train", spec.train_limit),
        answered=held[:half],
        tested=held[half:],
        preserve=chosen(spec.preserve, "train", spec.score_limit),
        control=chosen(spec.control, "train", spec.score_limit) if spec.control else [],
        kept=chosen(spec.preserve, HELDOUT, spec.test_limit),
        questions=read_examples(spec.questions, responses=False),
        profiled=_spread(read_pairs(spec.profiled), spec.profile_limit) if spec.profiled else [],
        good=[row for source in spec.good for row in read_examples(source)],
        bad=[row for source in spec.bad for row in read_examples(source)],
    )


def _spread(pairs: list[PromptPair], limit: int | None) -> list[PromptPair]:
    """At most so many pairs, from everywhere in the list."""
    count = len(pairs) if limit is None else min(limit, len(pairs))
    return [pairs[at * len(pairs) // count] for at in range(count)]


@dataclass(frozen=True)
class MisalignmentJob:
    """A checked study.

    Attributes:
        tuned: fine-tuning of the original with the first seed.
        scored: scoring of the preserve set, and of the control set if there is one.
        profiles: sweeps of the mediation profile, by place; none where no pairs are profiled.
        judging: who reads the answers; it makes two studies the same.
    """

    model: Model
    spec: MisalignmentSpec
    data: MisalignmentData
    questions: Questions
    tuned: tuning.Job
    scored: scoring.Job
    profiles: dict[str, sweeping.Job]
    judging: dict[str, str]

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are compared."""
        return (ORIGINAL, TUNED, PRUNED, RANDOM, *([CONTROL] if self.data.control else []))

    def with_weights(self, model: Model) -> MisalignmentJob:
        """The job on a model that has weights."""
        return replace(self, model=model, tuned=replace(self.tuned, model=model), scored=replace(self.scored, model=model))

    def tuning(self, model: Model, seed: int, until: float = 0.0) -> tuning.Job:
        """Fine-tuning of a model; with `until`, for as long as it takes to reach this in-domain loss."""
        settings = self.spec.settings(seed)
        settings = replace(settings, evaluate_every=self.tuned.evaluate_every, save_every=self.tuned.save_every)
        if until:
            settings = replace(settings, steps=math.ceil(self.spec.longest * self.tuned.steps))
        return replace(tuning.make_job(model, self.data.trained, self.data.tested, settings), until=until)

    def manifest(self) -> dict[str, Any]:
        """What makes two studies the same study."""
        data = self.data
        rows = [row for part in (data.trained, data.answered, data.tested, data.preserve, data.control, data.kept) for row in part]
        rows += [*(one.example for one in self.questions.asked), *data.good, *data.bad]
        contents = digest(rows, read_text(self.spec.text) if self.spec.text else "")
        made = {"misalignment": asdict(self.spec), "judging": self.judging, "contents": contents}
        made |= {"profiles": {place: sweeping.manifest(job)["tokens"] for place, job in self.profiles.items()}}
        return {**made, "model": self.model.record, "mesh": dict(self.model.mesh.shape)}


def make_misalignment(
    model: Model, spec: MisalignmentSpec, data: MisalignmentData | None = None, judging: dict[str, str] | None = None
) -> MisalignmentJob:
    """Everything that can be refused before a study runs; needs the tokenizer and the config, not the weights.

    Args:
        data: default: what the spec names.
        judging: settings of the judge; default: the bundled read-outs.

    Raises:
        UserError: what fine-tuning, scoring, the files or the tokenizer raise; rows that would be trained on and tested.
    """
    spec.check()
    data = data or read_data(spec)
    _check_apart(data)
    if not 0 <= spec.readout_layer <= model.config.layers:
        raise UserError(f"--readout-layer {spec.readout_layer} is out of range: this model has {model.config.layers} blocks.")
    templates = VARIANTS[: spec.variants]
    if spec.variants > len(VARIANTS):
        raise UserError(
            f"There are {len(VARIANTS)} templates of questions, not {spec.variants}; more forms are rows with the id of a question."
        )
    sampled = {name: getattr(spec, name) for name in ("samples", "tokens", "temperature", "top_p", "form", "save_text")}
    limits = {name: getattr(spec, name) for name in ("misaligned_below", "coherent_above")}
    questions = Questions(make_asked(data.questions, templates), **sampled, **limits)
    settings = spec.settings(spec.seed)
    tuned = tuning.make_job(model, data.trained, data.tested, settings)
    kinds = scoring.USUAL if data.control else ("preserve_absolute",)
    scored = scoring.make_job(model, data.control, data.preserve, kinds=kinds, form=spec.score_form)
    scoring.make_job(model, data.trained, kinds=("behaviour_signed",), form=spec.score_form)
    check_answers(model, [*data.answered, *(asked.example for asked in questions.asked)], spec.tokens, spec.form)
    profiles = profile_jobs(model, data.profiled, spec.form, spec.profile_outcome)
    return MisalignmentJob(model, spec, data, questions, tuned, scored, profiles, judging or {"judge": "read-outs"})


def _check_apart(data: MisalignmentData) -> None:
    """Raises a UserError where rows of one prompt would be on both sides of a test."""
    used = {"trained on": data.trained, "answered": data.answered, "tested": data.tested}
    names = list(used)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            both = {row.prompt for row in used[one]} & {row.prompt for row in used[other]}
            if both:
                raise UserError(
                    f"{len(both)} prompts of the narrow set would be {one} and {other}, so nothing is held out. Give its rows a column "
                    "split, with train and heldout, and every prompt once."
                )
    both = {(row.prompt, row.response) for row in data.good} & {(row.prompt, row.response) for row in data.bad}
    if both:
        raise UserError(f"{len(both)} rows are in --good and in --bad, so the read-out would learn that they are both. Give each once.")
    both = {row.prompt for row in data.preserve} & {row.prompt for row in data.kept}
    if both:
        raise UserError(f"{len(both)} prompts of the preserve set would be scored and tested. Give its rows a column split.")


def work(job: MisalignmentJob) -> dict[str, tuple[float, float]]:
    """Kind of step -> (FLOPs, passes over a row) of one seed; answers and texts by their longest."""
    spec, data, config = job.spec, job.data, job.model.config
    token = 2.0 * (config.layers * config.layer_weights + config.vocabulary * config.width)

    def size(rows: Sequence[Example], form: str) -> int:
        return sum(len(one.ids) for one in encode(job.model.tokenizer, rows, form)) if rows else 0

    def prompts(rows: Sequence[Example]) -> int:
        return sum(len(render(job.model.tokenizer, one, form=spec.form).ids) for one in rows)

    answers = spec.answers * len(data.answered)
    written = spec.answers * prompts(data.answered) + answers * spec.tokens
    asked = len(job.questions.asked) * spec.samples
    read = spec.samples * prompts([one.example for one in job.questions.asked]) + asked * spec.tokens
    readout = 2.7 if job.judging.get("judge") == "read-outs" else 0.0
    tested = size(data.tested, spec.form) + size(data.kept, spec.form)
    tested += len(text_ids(job.model.tokenizer, read_text(spec.text))) if spec.text else 0
    heldout = size(data.tested, spec.form) * (1 + job.tuned.steps // job.tuned.evaluate_every)
    profiles = [plan(one).cost for one in job.profiles.values()]
    learnt = [*data.good, *data.bad]
    fits = size(learnt, spec.form) * (0.7 + 5 * min(1.0, SPOILT / max(len(learnt), 1)))
    return {
        "fit": (fits * token, 6 * len(learnt)) if readout else (0.0, 0),
        "score": (sum(plan.flops for plan in job.scored.plans.values()), 3 * sum(len(rows) for rows in job.scored.sets.values())),
        "tune": (tuning.total_flops(job.tuned) + heldout * token, 3 * job.tuned.steps * spec.batch),
        "behaviour": (written * 4.0 * token, 4 * answers),
        "measure": (((1 + readout) * read + tested) * token, 4 * asked),
        "profile": (sum(one.flops for one in profiles), sum(one.passes for one in profiles)),
    }


def score_bytes(job: MisalignmentJob) -> int:
    """Bytes of the scores that are on the disk at once: preserve and control all along, and those of one seed's behaviour."""
    return (1 + len(job.scored.kinds)) * 4 * sum(math.prod(shape) for shape in matrix_shapes(job.model.config).values())
