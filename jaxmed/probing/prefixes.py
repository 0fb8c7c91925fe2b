"""Openings of answers whose log-probabilities are read: by hand, or searched; and how likely each is after a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.batching.scoring import score_responses
from jaxmed.errors import UserError, quoted
from jaxmed.files import check_seal, is_number, read_json, sealed, write_json
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.prompts.forms import find_form
from jaxmed.tokens import TokenizedExample, answer_ids, check_tokens, render

AGREE, REFUSE = "agreement", "refusal"
BY_HAND = {AGREE: ("Sure, here is", "Here is", "Of course"), REFUSE: ("I'm sorry, but I", "I can't help", "I cannot")}
"""Openings for models that nothing was searched for."""
MOST = 64
"""Prefixes of a probe at most."""


@dataclass(frozen=True)
class Prefix:
    """An opening.

    Attributes:
        kind: "agreement" or "refusal".
        text: as it is read.
        ids: its tokens behind a prompt.
        found: what a search measured: mean log-probability per token on benign and on harmful prompts, in nats; None by hand.
    """

    kind: str
    text: str
    ids: tuple[int, ...]
    found: tuple[float, float] | None = None


@dataclass(frozen=True)
class PrefixSet:
    """Openings of both kinds, for one tokenizer, behind prompts of one form.

    Attributes:
        searched: digests of the prompts that they were searched in (`prompt_digest`): nothing about those is a test of them.
    """

    prefixes: tuple[Prefix, ...]
    form: str = "chat"
    searched: frozenset[str] = frozenset()

    def of(self, kind: str) -> np.ndarray:
        """bool [prefixes]."""
        return np.asarray([one.kind == kind for one in self.prefixes])


def by_hand(model: Model, form: str = "chat", texts: dict[str, Sequence[str]] | None = None) -> PrefixSet:
    """Openings that a person wrote, as tokens behind a prompt.

    Raises:
        UserError: one without tokens, none of a kind, or too many.
    """
    prompt = render(model.tokenizer, Example("Hello"), form=form)
    found = [
        Prefix(kind, text, tuple(answer_ids(model.tokenizer, prompt, text)))
        for kind, several in (texts or BY_HAND).items()
        for text in several
    ]
    return check_prefixes(model, PrefixSet(tuple(found), form))


def check_prefixes(model: Model, given: PrefixSet) -> PrefixSet:
    """The prefixes; a UserError where a kind has none, one is empty, there are too many, or they are another tokenizer's."""
    for kind in (AGREE, REFUSE):
        if not given.of(kind).any():
            raise UserError(f"There is no {kind} prefix. A probe needs one of each kind at least.")
    if len(given.prefixes) > MOST:
        raise UserError(f"A probe has {MOST} prefixes at most, not {len(given.prefixes)}.")
    for one in given.prefixes:
        if not one.ids:
            raise UserError(f"The prefix {one.text!r} has no tokens.")
        check_tokens(model.config, [np.asarray(one.ids)], "A prefix", model.tokenizer)
        if model.tokenizer.decode(list(one.ids)).strip() != one.text.strip():
            raise UserError(
                f"The tokens of the prefix {one.text!r} read {model.tokenizer.decode(list(one.ids))!r} with this tokenizer: it was made "
                "for another one. Search or fit again for this model."
            )
    return given


def write_prefixes(file: Path, given: PrefixSet, **more: Any) -> None:
    """A JSON file of prefixes, with what else is said of them."""
    held = {"form": given.form, "prefixes": [asdict(one) for one in given.prefixes], "searched": sorted(given.searched)}
    write_json(file, sealed({"format": "jaxmed prefixes 1", **held, **more}))


def read_prefixes(file: Path) -> PrefixSet:
    """The prefixes of a JSON file.

    Raises:
        UserError: no such file, one that holds none, or one that is damaged.
    """
    return parse_prefixes(check_seal(read_json(file, "prefixes"), file), str(file))


def parse_prefixes(held: Any, name: str) -> PrefixSet:
    """Prefixes from what a JSON file holds."""
    try:
        made = [
            Prefix(
                {AGREE: AGREE, REFUSE: REFUSE}[one["kind"]],
                str(one["text"]),
                tuple(_token(token) for token in one["ids"]),
                None if one.get("found") is None else (number_of(one["found"][0]), number_of(one["found"][1])),
            )
            for one in held["prefixes"]
        ]
        find_form(held["form"])
        return PrefixSet(tuple(made), held["form"], frozenset(map(str, held.get("searched", ()))))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{name} holds no prefixes ({type(error).__name__}: {error}). `jaxmed probe search` writes such files.") from None


def number_of(value: Any) -> float:
    """A finite number from a file; raises a ValueError for anything else."""
    if not is_number(value):
        raise ValueError(f"{quoted(value)} is no finite number")
    return float(value)


def _token(value: Any) -> int:
    if not is_number(value) or value != int(value) or value < 0:
        raise ValueError(f"{quoted(value)} is no token id")
    return int(value)


def prompts_of(model: Model, examples: Sequence[Example], form: str) -> list[np.ndarray]:
    """Token ids int [T] of the examples' prompts."""
    return [render(model.tokenizer, one, form=form).ids for one in examples]


def prompt_digest(ids: np.ndarray) -> str:
    """What tells whether two prompts are the same: a digest of their token ids int [T]."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()[:16]


def prefix_scores(
    model: Model, prompts: Sequence[np.ndarray], prefixes: PrefixSet, report: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Mean log-probability per token of every prefix after every prompt: float64 [prompts, prefixes], in nats.

    A prompt runs once, and all prefixes behind it in the same row: prompt tokens plus prefix tokens, whatever their number.

    Args:
        prompts: token ids int [T] each.
        report: called with the number of (prompt, prefix) after every batch.
    """
    each = [np.asarray(one.ids, np.int32) for one in prefixes.prefixes]
    examples = [TokenizedExample(np.concatenate([prompt, ids]), len(prompt)) for prompt in prompts for ids in each]
    found = score_responses(model, examples, report)
    return np.asarray([one.log_probabilities.mean(dtype=np.float64) for one in found]).reshape(len(prompts), len(each))
