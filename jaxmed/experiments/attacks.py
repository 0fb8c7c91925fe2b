"""A pruned model under attack. Attacked models exist in memory alone: they are measured, never written.

Pre-filled: the first tokens of the response are given, the loss of the rest is measured. Refusal removed: the weights of refusal are chosen
by absolute SNIP on refusals without those of a preserve set, scored on the pruned model itself, and set to zero (Wei et al. 2024, as
Orgad et al. 2026 use it). Fine-tuned: the pruned model is trained on the responses that the attack is after, with adapters on all
matrices of its blocks, and measured on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from jaxmed.batching.texts import encode
from jaxmed.errors import UserError
from jaxmed.evaluation.answers import answer, check_answers
from jaxmed.evaluation.rates import rate
from jaxmed.evaluation.refusals import is_refusal
from jaxmed.experiments.measure import Tests, compare, measure
from jaxmed.experiments.table import Table
from jaxmed.experiments.trials import Trial, mask_trial, run_trials
from jaxmed.files import Row
from jaxmed.finetuning.job import make_job
from jaxmed.finetuning.run import run_job
from jaxmed.finetuning.settings import Settings
from jaxmed.models.checkpoints.edit_record import ATTACK
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.pruning.apply import apply_mask
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.rule import Rule
from jaxmed.pruning.scores import score
from jaxmed.pruning.selection import select
from jaxmed.tokens import TokenizedExample

ATTACKS = "attacks.csv"
KEY = ("mask", "attack")
NAMES = ("none", "prefill", "refusal removed", "both", "fine-tuned")
PREFILLED, REMOVED, TRAINED = ("prefill", "both"), ("refusal removed", "both"), ("fine-tuned",)
TRAINING = Settings(rank=128, alpha=16.0, learning_rate=2e-4, epochs=5.0, batch=5, form="plain")
"""Of harmful fine-tuning, as Orgad et al. 2026 have it."""


@dataclass(frozen=True)
class Attack:
    """How models are attacked and measured.

    Attributes:
        behaviour: rows with the responses that an attack is after.
        requests: what a model may refuse.
        refusals: requests with refusals, whose weights are removed; empty: that attack is left out.
        preserve: rows whose weights are spared then.
        prefill: tokens of a response that are given.
        rule: of the weights of refusal.
        tokens: of an answer to a request.
        form: how prompts and responses are joined in losses; see `texts.encode`.
        trained: rows with responses that models are fine-tuned on, none of which is among `behaviour`; empty: that attack is left out.
        training: how.
    """

    behaviour: Sequence[Example]
    requests: Sequence[Example] = ()
    refusals: Sequence[Example] = ()
    preserve: Sequence[Example] = ()
    prefill: int = 10
    rule: Rule = field(default_factory=lambda: Rule(q=0.01, p=0.01, score="absolute"))
    tokens: int = 24
    form: str = "plain"
    text: str = "neutral"
    trained: Sequence[Example] = ()
    training: Settings = TRAINING

    @property
    def names(self) -> tuple[str, ...]:
        """The attacks that are tried, none first."""
        left_out = (() if self.refusals else REMOVED) + (() if self.trained else TRAINED)
        return tuple(name for name in NAMES if name not in left_out)

    def check(self, model: Model | None = None) -> None:
        """Raises a UserError for what cannot be used, by this model."""
        if model is not None:
            if not shifted(encode(model.tokenizer, self.behaviour, self.form), self.prefill):
                raise UserError(f"No response has more than {self.prefill} tokens, so none is left after a pre-filled opening.")
            check_answers(model, (*self.requests, *self.refusals), self.tokens)
            if self.trained:
                make_job(model, self.trained, (), self.training)
        self.rule.check()
        if self.prefill < 1:
            raise UserError(f"The pre-filled opening has {self.prefill} tokens; it needs one at least.")
        if bool(self.refusals) != bool(self.preserve):
            raise UserError("Removing refusal needs both refusals and a preserve set.")
        both = {(row.prompt, row.response) for row in self.behaviour} & {(row.prompt, row.response) for row in self.trained}
        if both:
            raise UserError(
                f"{len(both)} rows would be trained on and measured. Give the rows a column split, with train and heldout, or other rows."
            )


def shifted(examples: Sequence[TokenizedExample], count: int) -> list[TokenizedExample]:
    """The examples with the first `count` response tokens counted as prompt; those with no more than that are left out."""
    return [replace(one, prompt=one.prompt + count) for one in examples if len(one.ids) - one.prompt > count]


def without_refusal(model: Model, attack: Attack) -> Model:
    """The model with its weights of refusal set to zero, in memory, marked so that no command writes it."""
    kinds = ("behaviour_absolute", "preserve_absolute")
    scores = score(model, attack.refusals, attack.preserve, kinds=kinds, form="chat")
    return apply_mask(model, select(scores, attack.rule, tag=ATTACK))


def fine_tuned(model: Model, attack: Attack) -> Model:
    """The model trained on the responses that an attack is after, in memory, marked so that no command writes it."""
    found = run_job(make_job(model, attack.trained, (), attack.training)).model
    *before, edit = found.history
    return replace(found, history=(*before, {**edit, "tag": ATTACK})).describe_params()


def run_attacks(model: Model, masks: Mapping[str, Mask], attack: Attack, table: Table | None = None) -> Table:
    """A row per mask (and for the model as it is) and attack.

    Columns: `generate_*` (the loss of the responses, and its rise over the unpruned model under the same reading), `perplexity_*`,
    `refuse` with its interval.
    """
    attack.check(model)
    encoded = encode(model.tokenizer, attack.behaviour, attack.form)
    opened = shifted(encoded, attack.prefill)
    tests = {False: Tests({"generate": encoded}, attack.text), True: Tests({"generate": opened}, "")}
    first = cache(lambda prefilled: measure(model, tests[prefilled]))

    def measured(trial: Trial, attacked: Model) -> Row:
        prefilled = trial.key[1] in PREFILLED
        after = first(prefilled) if attacked is model else measure(attacked, tests[prefilled])
        row = {"perplexity": "", "perplexity_ratio": "", "perplexity_low": "", "perplexity_high": "", **compare(first(prefilled), after)}
        return {**row, **_refusals(attacked, attack, prefilled)}

    return run_trials(_trials(model, masks, attack), measured, table or Table(KEY))


def _trials(model: Model, masks: Mapping[str, Mask], attack: Attack) -> Iterator[Trial]:
    """Every mask, the empty one first, under every attack. A model without its weights of refusal is made once for two of them."""
    for name, mask in {"none": next(iter(masks.values())).emptied(), **masks}.items():
        plain = mask_trial(model, (name, NAMES[0]), mask)
        pruned = cache(plain.make)
        removed = cache(lambda pruned=pruned: without_refusal(pruned(), attack))
        trained = cache(lambda pruned=pruned: fine_tuned(pruned(), attack))
        made = dict.fromkeys(REMOVED, removed) | dict.fromkeys(TRAINED, trained)
        for title in attack.names:
            yield replace(plain, key=(name, title), make=made.get(title, pruned))


def _refusals(model: Model, attack: Attack, prefilled: bool) -> Row:
    """The refusal rate; a pre-filled opening leaves nothing to refuse, so it has none."""
    if not attack.requests:
        return {}
    if prefilled:
        return {"refuse": "", "refuse_low": "", "refuse_high": ""}
    found = rate("refuse", [is_refusal(text) for text in answer(model, attack.requests, attack.tokens)])
    return {"refuse": found.rate, "refuse_low": found.low, "refuse_high": found.high}
