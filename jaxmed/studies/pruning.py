"""The study of targeted pruning (Orgad et al. 2026), end to end: scores, curves, transfer, compression, dissociation, attacks.

Models stand in the order of their training, the base first. Every model is loaded once; whatever is finished is on disk and is not done
again. Transfer is of the first model; dissociation and attacks are of the last one, which is the one that refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError
from jaxmed.experiments.attacks import Attack
from jaxmed.experiments.curve import needed_kinds
from jaxmed.experiments.dissociation import QUESTION, Abilities
from jaxmed.models.config import ModelConfig
from jaxmed.prompts.examples import HELDOUT, Example, chosen, digest, harmful
from jaxmed.prompts.readers import read_text
from jaxmed.pruning.rule import Rule

STUDY = "targeted pruning"


@dataclass(frozen=True)
class PruningStudy:
    """What is studied. Sets are names of bundled ones or the user's files.

    Attributes:
        models: names, the base first, then stages of its training.
        behaviours, controls: sets with responses; compression is against the first control.
        preserve: set whose weights are spared.
        q, p, qs: shares of the rule: for masks, spared, and for curves.
        score_limit, test_limit: first examples of a set that are scored, and that are tested; None: all.
        text: for the perplexity; form: how prompts and responses are joined.
        against: baselines of the curves of the first behaviour; seeds: draws of random ones.
        utility: rise of the perplexity up to which a behaviour counts as halved without harm.
        twins, explanations, requests, refusals, question, name: of dissociation and attacks, about the first behaviour.
        refusal_examples, refusal_q, refusal_p, prefill: of attacks.
        tokens: of an answer to a request.
    """

    models: tuple[str, ...]
    behaviours: tuple[str, ...]
    controls: tuple[str, ...]
    preserve: str
    q: float = 1e-4
    p: float = 5e-3
    qs: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    score_limit: int | None = None
    test_limit: int | None = None
    text: str = "neutral"
    form: str = "plain"
    against: tuple[str, ...] = ("random",)
    seeds: int = 1
    utility: float = 0.01
    twins: str = ""
    explanations: str = ""
    requests: str = ""
    refusals: str = ""
    question: str = QUESTION
    name: str = ""
    refusal_examples: int = 128
    refusal_q: float = 0.01
    refusal_p: float = 0.01
    prefill: int = 10
    tokens: int = 24

    @property
    def targets(self) -> tuple[str, ...]:
        """All sets that are pruned for."""
        return (*self.behaviours, *self.controls)

    def check(self) -> None:
        """Reads every file, so that what is missing is said before a model runs.

        Raises:
            UserError: no models or sets, two of one name, values out of range, or what the files raise.
        """
        if not self.models or not self.behaviours:
            raise UserError("A study of pruning needs at least one model and one behaviour.")
        sets = tuple(short(one) for one in (*self.targets, self.preserve))
        for what, names in (("models", self.models), ("sets", sets)):
            if len(set(names)) < len(names) or "none" in names:
                raise UserError(f"Results are named after the {what}: no two may have the same name, and none 'none' ({', '.join(names)}).")
        for q in (self.q, *self.qs):
            Rule(q=q, p=self.p).check()
        for source in (*self.targets, self.preserve):
            both = {(row.prompt, row.response) for row in self.scored(source)} & {(row.prompt, row.response) for row in self.tested(source)}
            if both:
                raise UserError(
                    f"{source}: {len(both)} rows would be scored and tested, so nothing is held out. Give its rows a column split, with "
                    "train and heldout."
                )
        self.abilities.check()
        self.attack.check()

    def scored(self, source: str) -> list[Example]:
        """The examples of a set that are scored."""
        return chosen(source, "train", self.score_limit)

    def kinds(self, source: str) -> tuple[str, ...]:
        """The kinds of scores of a set; those of the preserve set, and what baselines read, come with the first one."""
        rules = [Rule(p=0)]
        if source == self.targets[0]:
            rules = [Rule(p=self.p, score=name) for name in ("signed", *self.against)]  # type: ignore[arg-type]
        return tuple(sorted({kind for rule in rules for kind in needed_kinds(rule)}))

    def disk_bytes(self, config: ModelConfig) -> int:
        """What the scores of all models take: float32 for every weight of the blocks and kind."""
        arrays = sum(not kind.endswith("inputs") for source in self.targets for kind in self.kinds(source))
        return len(self.models) * arrays * 4 * config.layers * config.layer_weights

    def tested(self, source: str, responses: bool = True) -> list[Example]:
        """The examples of a set that are tested; none for an empty name."""
        return chosen(source, HELDOUT, self.test_limit, responses) if source else []

    @cached_property
    def abilities(self) -> Abilities:
        """What dissociation measures."""
        return Abilities(
            name=self.name or short(self.behaviours[0]),
            behaviour=self.tested(self.behaviours[0]),
            twins=self.tested(self.twins),
            explanations=self.tested(self.explanations),
            requests=harmful(self.requests, chosen(self.requests, HELDOUT, None, False))[: self.test_limit] if self.requests else (),
            preserve=self.tested(self.preserve),
            question=self.question,
            text=self.text,
            tokens=self.tokens,
            form=self.form,
        )

    @cached_property
    def attack(self) -> Attack:
        """What attacks measure."""
        return Attack(
            behaviour=self.tested(self.behaviours[0]),
            requests=self.abilities.requests,
            refusals=harmful(self.refusals, chosen(self.refusals, "train"))[: self.refusal_examples] if self.refusals else (),
            preserve=chosen(self.preserve, "train", self.refusal_examples) if self.refusals else (),
            prefill=self.prefill,
            rule=Rule(q=self.refusal_q, p=self.refusal_p, score="absolute"),
            tokens=self.tokens,
            form=self.form,
            text=self.text,
        )

    def manifest(self) -> dict[str, Any]:
        """What makes two studies the same study: every field, and what the files hold."""
        rows = [row for source in (*self.targets, self.preserve) for row in (*self.scored(source), *self.tested(source))]
        rows += [*self.abilities.twins, *self.abilities.explanations, *self.abilities.requests, *self.attack.refusals]
        contents = digest(rows, read_text(self.text) if self.text else "")
        return {"study": STUDY, **{one.name: getattr(self, one.name) for one in fields(self)}, "contents": contents}


def short(source: str) -> str:
    """A set's name."""
    return Path(source).stem


@dataclass(frozen=True)
class Step:
    """A part of the study.

    Attributes:
        passes: forwards of `tokens` tokens that it takes, for the plan.
    """

    title: str
    passes: float
    tokens: int


def plan_steps(study: PruningStudy, tokenizer: Any) -> list[Step]:
    """What the study will do, with the tokens that run through a model."""
    from jaxmed.batching.texts import encode
    from jaxmed.tokens import text_ids

    def size(rows: list[Example]) -> int:
        return sum(len(one.ids) for one in encode(tokenizer, rows, study.form)) if rows else 0

    text = len(text_ids(tokenizer, read_text(study.text))) if study.text else 0
    scored = {source: size(study.scored(source)) for source in (*study.targets, study.preserve)}
    tested = {source: size(study.tested(source)) for source in (*study.targets, study.preserve)}
    models, sets = len(study.models), len(study.targets)
    baselines = len(study.qs) * sum(study.seeds if name == "random" else 1 for name in study.against)
    behaviour, preserve = tested[study.behaviours[0]], tested[study.preserve]
    curves = sum(tested.values()) + text + len(study.qs) * sum(tested[source] + preserve + text for source in study.targets)
    curves += baselines * (behaviour + preserve + text)
    examined = min(1, len(study.behaviours)) + min(1, len(study.controls))
    abilities = study.abilities
    asked = 40 * (len(abilities.twins) + len(abilities.behaviour)) + (40 + study.tokens) * len(abilities.requests)
    each = behaviour + preserve + text + size(list(abilities.explanations)) + asked
    attacked = 2 * behaviour + text + (40 + study.tokens) * len(abilities.requests)
    removal = 3 * (size(list(study.attack.refusals)) + size(list(study.attack.preserve)))
    return [
        Step(f"scores of {sets + 1} sets, {models} models", models * 3.0, sum(scored.values())),
        Step(f"curves over {len(study.qs)} shares of {sets} sets, {models} models", models, curves),
        Step(f"transfer of {sets} masks", sets * (1 + study.seeds), sum(tested.values()) + text),
        Step(f"dissociation of {examined} masks", 1 + examined * (1 + study.seeds), each),
        Step(f"attacks on {examined + 1} models", examined + 1, attacked * (2 if study.refusals else 1) + removal),
        Step("compression, from the curves", 0, 0),
    ]
