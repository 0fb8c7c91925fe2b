"""The study of targeted pruning (Orgad et al. 2026), end to end: scores, curves, transfer, compression, dissociation, attacks.

Models stand in the order of their training, the base first. Every model is loaded once; whatever is finished is on disk and is not done
again. Transfer is of the first model; dissociation and attacks are of the last one, which is the one that refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmed.errors import UserError
from jaxmed.experiments.specs import AbilitySpec, AttackSpec, FormSpec, SparedSpec, TextSpec, UtilitySpec
from jaxmed.models.catalog import DEFAULT
from jaxmed.models.config import ModelConfig
from jaxmed.prompts.examples import HELDOUT, Example, chosen, digest, harmful
from jaxmed.prompts.readers import read_text
from jaxmed.pruning.rule import Rule, ScoreName

if TYPE_CHECKING:
    from jaxmed.experiments.attacks import Attack
    from jaxmed.experiments.dissociation import Abilities

STUDY = "targeted pruning"


@dataclass(frozen=True, kw_only=True)
class PruningStudy(AbilitySpec, AttackSpec, TextSpec, FormSpec, UtilitySpec, SparedSpec):
    """Targeted pruning end to end: curves, transfer, compression, dissociation and attacks, with figures and tables on one page."""

    models: tuple[str, ...] = (DEFAULT, "smollm2-135m-aligned")
    """Models in the order of their training, the base first; one is enough for all but compression."""
    revisions: tuple[str, ...] = ()
    """Branch, tag or commit of each of --models on the Hugging Face hub, in the same order; an empty text: the default one."""
    adapters: tuple[str, ...] = ()
    """LoRA adapter of each of --models, as the folder that PEFT saves, in the same order; an empty text: none."""
    masks: tuple[str, ...] = ()
    """Mask file whose weights are set to zero in each of --models after loading, in the same order; an empty text: none."""
    behaviours: tuple[str, ...] = ("rude", "foolish", "sycophantic")
    """Bundled sets or your files with responses; dissociation and attacks are about the first."""
    controls: tuple[str, ...] = ("trivia", "pirate")
    """Bundled sets or your files of control behaviours; compression is against the first."""
    preserve: str = "ordinary"
    """Set whose weights are spared, bundled or yours."""
    q: float = 1e-4
    """Fraction of weights that are chosen per matrix, for transfer, dissociation and attacks."""
    qs: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    """Fractions of weights that are chosen along the curves."""
    score_limit: int | None = None
    """Examples of each set that are scored at most, from its beginning; default: all."""
    test_limit: int | None = None
    """Held-out examples of each set that are tested at most, from its beginning; default: all."""
    against: tuple[ScoreName, ...] = ("random",)
    """Baselines of the first behaviour's curve: other rules by which as many weights are chosen."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What the models are called in tables."""
        parts = zip(self.models, *(self.each(name) for name in ("revisions", "adapters", "masks")), strict=True)
        return tuple(
            f"{model}{f'@{revision}' * bool(revision)}{f' + {Path(adapter).name}' * bool(adapter)}{f' - {Path(mask).stem}' * bool(mask)}"
            for model, revision, adapter, mask in parts
        )

    def each(self, name: str) -> tuple[str, ...]:
        """The values of `revisions`, `adapters` or `masks`, one per model; a UserError for another number of them."""
        given = getattr(self, name) or ("",) * len(self.models)
        if len(given) != len(self.models):
            raise UserError(f"--{name} has {len(given)} values for {len(self.models)} models. Give one each, an empty text for none.")
        return given

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
        for what, names in (("models", self.labels), ("sets", sets)):
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
        from jaxmed.experiments.curve import needed_kinds

        rules = [Rule(p=0.0)]
        if source == self.targets[0]:
            rules = [Rule(p=self.p, score=name) for name in ("signed", *self.against)]
        return tuple(sorted({kind for rule in rules for kind in needed_kinds(rule)}))

    def score_bytes(self, config: ModelConfig) -> int:
        """What the scores of one model take: float32 for every weight of the blocks and kind."""
        arrays = sum(not kind.endswith("inputs") for source in self.targets for kind in self.kinds(source))
        return arrays * 4 * config.layers * config.layer_weights

    def tested(self, source: str, responses: bool = True) -> list[Example]:
        """The examples of a set that are tested; none for an empty name."""
        return chosen(source, HELDOUT, self.test_limit, responses) if source else []

    @cached_property
    def abilities(self) -> Abilities:
        """What dissociation measures."""
        sources = {"behaviour": self.behaviours[0], "twins": self.twins, "explanations": self.explanations, "preserve": self.preserve}
        asked = harmful(self.requests, chosen(self.requests, HELDOUT, None, False))[: self.test_limit] if self.requests else []
        rows = {name: self.tested(source) for name, source in sources.items()}
        return self.make_abilities(self.behaviours[0], rows, asked, self.text, self.form)

    @cached_property
    def attack(self) -> Attack:
        """What attacks measure."""
        return self.make_attack(self.tested(self.behaviours[0]), list(self.abilities.requests), self.preserve, self.text, self.form)

    @property
    def examined(self) -> tuple[str, ...]:
        """The masks of dissociation and attacks: the first behaviour's and the first control's."""
        return tuple(short(source) for source in (*self.behaviours[:1], *self.controls[:1]))

    def manifest(self) -> dict[str, Any]:
        """What makes two studies the same study: every field, and what the files hold."""
        rows = [row for source in (*self.targets, self.preserve) for row in (*self.scored(source), *self.tested(source))]
        rows += [*self.abilities.twins, *self.abilities.explanations, *self.abilities.requests, *self.attack.refusals, *self.attack.trained]
        contents = digest(rows, read_text(self.text) if self.text else "")
        return {"study": STUDY, **{one.name: getattr(self, one.name) for one in fields(PruningStudy)}, "contents": contents}


def short(source: str) -> str:
    """A set's name."""
    return Path(source).stem
