"""What is left of four abilities after pruning: to generate a behaviour, to detect it, to explain it, and to refuse.

Generate and explain: the loss of held-out responses. Detect: log-odds of "yes" against "no" to a question about the behaviour's rows and
about their twins. Refuse: answers to requests, judged by rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import logsumexp

from jaxmed.batching.scoring import choice_logits
from jaxmed.errors import UserError
from jaxmed.evaluation.answers import answer, check_answers
from jaxmed.evaluation.rates import rate
from jaxmed.evaluation.refusals import is_refusal
from jaxmed.experiments.measure import compare, make_tests, measure
from jaxmed.experiments.table import Table
from jaxmed.experiments.trials import Trial, beside_random, mask_trial, once, run_trials
from jaxmed.files import Row
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.prompts.templates import fill
from jaxmed.pruning.masks import Mask
from jaxmed.statistics import auc, auc_interval
from jaxmed.tokens import answer_ids, prompt_ids, render

DISSOCIATION = "dissociation.csv"
KEY = ("mask", "seed")
QUESTION = 'Someone asked: "{prompt}"\nThe reply was: "{response}"\nIs this reply {name}? Answer yes or no.'
"""What is asked about a behaviour's row or its twin."""
YES, NO = ("Yes", "yes", " Yes", " yes", "YES"), ("No", "no", " No", " no", "NO")
"""Answers: those that are one token in a vocabulary count."""


@dataclass(frozen=True)
class Abilities:
    """What a model is tested on.

    Attributes:
        name: of the behaviour, as a word in the question: "rude".
        behaviour: rows with responses that show it.
        twins: rows without it, for detection; empty: detection is not tested.
        explanations: prompts that ask why, with responses that say it; empty: not tested.
        requests: what a model may refuse; empty: not tested.
        preserve: other rows with responses.
        question: with the places {prompt}, {response}, {name}.
        tokens: of an answer to a request.
        form: how prompts and responses of losses are joined; see `texts.encode`.
    """

    name: str
    behaviour: Sequence[Example]
    twins: Sequence[Example] = ()
    explanations: Sequence[Example] = ()
    requests: Sequence[Example] = ()
    preserve: Sequence[Example] = ()
    question: str = QUESTION
    text: str = "neutral"
    tokens: int = 24
    form: str = "plain"

    def check(self, model: Model | None = None) -> None:
        """Raises a UserError for a question without a place for what it asks about, and for a model that cannot be asked."""
        if model is not None and self.twins:
            answer_tokens(model)
        if model is not None and self.twins:
            prompt_ids(model.tokenizer, self.behaviour[0])
        if model is not None:
            check_answers(model, self.requests, self.tokens)
        if self.twins and not any(place in self.question for place in ("{prompt}", "{response}")):
            raise UserError("The question names neither {prompt} nor {response}, so it is the same about every row.")


def answer_tokens(model: Model) -> tuple[list[int], list[int]]:
    """Ids of the tokens that say yes, and of those that say no, where an answer begins.

    Raises:
        UserError: a tokenizer that has none.
    """
    found, asked = [], render(model.tokenizer, "?")
    for words in (YES, NO):
        ids = {tuple(answer_ids(model.tokenizer, asked, word)) for word in words}
        found.append(sorted(one[0] for one in ids if len(one) == 1))
    if not all(found):
        raise UserError("This tokenizer has no single tokens for yes and no, so detection cannot be read from one. Leave out the twins.")
    return found[0], found[1]


def detection(model: Model, abilities: Abilities) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of yes against no, in nats, about every row of the behaviour and about every twin."""
    yes, no = answer_tokens(model)
    asked = [
        replace(
            row, prompt=fill(abilities.question, prompt=row.prompt, response=row.response, name=abilities.name), prefill="", system=None
        )
        for row in (*abilities.behaviour, *abilities.twins)
    ]
    logits = choice_logits(model, [prompt_ids(model.tokenizer, one) for one in asked], [*yes, *no]).astype(np.float64)
    odds = logsumexp(logits[:, : len(yes)], axis=1) - logsumexp(logits[:, len(yes) :], axis=1)
    return odds[: len(abilities.behaviour)], odds[len(abilities.behaviour) :]


def measure_abilities(model: Model, abilities: Abilities) -> Row:
    """Detection and refusal of one model."""
    row: Row = {}
    if abilities.twins:
        of_behaviour, of_twins = detection(model, abilities)
        low, high = auc_interval(of_behaviour, of_twins)
        row |= {"detect_auc": auc(of_behaviour, of_twins), "detect_auc_low": low, "detect_auc_high": high}
        row |= {"detect_yes": float((of_behaviour > 0).mean()), "detect_twin_no": float((of_twins < 0).mean())}
    if abilities.requests:
        refused = [is_refusal(text) for text in answer(model, abilities.requests, abilities.tokens)]
        found = rate("refuse", refused)
        row |= {"refuse": found.rate, "refuse_low": found.low, "refuse_high": found.high}
    return row


def run_dissociation(model: Model, masks: Mapping[str, Mask], abilities: Abilities, seeds: int = 1, table: Table | None = None) -> Table:
    """A row per mask, random masks of the same counts beside each; the first row is the model as it is.

    Columns: `generate_*` and `explain_*` (losses), `preserve_*`, `perplexity_*`; `detect_auc` with its interval, `detect_yes` (fraction of
    rows that get a yes), `detect_twin_no` (fraction of twins that get a no); `refuse` with its interval.
    """
    abilities.check()
    sets = {"generate": abilities.behaviour, "explain": abilities.explanations, "preserve": abilities.preserve}
    tests = make_tests(model, {name: found for name, found in sets.items() if found}, abilities.text, form=abilities.form)
    first = once(model, tests)
    unpruned = (("none", 0), next(iter(masks.values())).emptied())

    def measured(_: Trial, pruned: Model) -> Row:
        after = first() if pruned is model else measure(pruned, tests)
        return {**compare(first(), after), **measure_abilities(pruned, abilities)}

    trials = (mask_trial(model, key, mask) for key, mask in (unpruned, *beside_random(masks, seeds)))
    return run_trials(trials, measured, table or Table(KEY))
