"""`jm.probe`: from labelled prompts to a read-out, in one call; and what a read-out says of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.probing.prefixes import PrefixSet, by_hand
from jaxmed.probing.probe import Probe, fit
from jaxmed.probing.probe import score as score_ids
from jaxmed.probing.search import search
from jaxmed.probing.spec import FitSpec, SearchSpec
from jaxmed.tokens import check_several, render


def _ids(model: Model, prompts: Sequence[Any], form: str) -> list[np.ndarray]:
    check_several(prompts)
    return [prompt if isinstance(prompt, np.ndarray) else render(model, prompt, form=form).ids for prompt in prompts]


def probe(
    model: Model,
    benign: Sequence[Any],
    harmful: Sequence[Any],
    prefixes: PrefixSet | SearchSpec | None = None,
    form: str = "chat",
    fpr: float = 0.05,
    folds: int = 5,
    seed: int = 0,
) -> Probe:
    """A read-out of prompts: refusal openings minus agreement openings, standardised on benign prompts (Yang et al. 2025).

    Args:
        benign, harmful: user messages, examples, chats, or token ids int [T].
        prefixes: openings; how to search them, in every second prompt, and the fit has the others; default: six written by hand.
        form: how prompts are written; see `prompts.forms`.
        fpr, folds, seed: see `jaxmed.probing.spec.FitSpec`.

    Raises:
        UserError: too few prompts; openings that cannot be used; numbers out of range.
    """
    if isinstance(prefixes, PrefixSet) and form not in ("chat", prefixes.form):
        raise UserError(f"The openings stand behind prompts of the form {prefixes.form!r}, not {form!r}. Leave form out.")
    form = prefixes.form if isinstance(prefixes, PrefixSet) else form
    low, high = _ids(model, benign, form), _ids(model, harmful, form)
    if isinstance(prefixes, SearchSpec):
        prefixes = search(model, low[::2], high[::2], prefixes, form)
        low, high = low[1::2], high[1::2]
    return fit(model, low, high, prefixes or by_hand(model, form), FitSpec(fpr=fpr, folds=folds, seed=seed))


def score(model: Model, prompts: Sequence[Any], fitted: Probe) -> np.ndarray:
    """Standardised scores float64 [prompts]: above `fitted.threshold` a prompt is flagged.

    Args:
        prompts: user messages, examples, chats, or token ids int [T].

    Raises:
        UserError: a probe of another tokenizer.
    """
    return score_ids(model, _ids(model, prompts, fitted.prefixes.form), fitted)
