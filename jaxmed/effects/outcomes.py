"""Outcomes: what a run is scored by. Always target against foil, as the pairs file names them.

A new outcome is one row of `OUTCOMES`. Answer texts have the tokens that they have behind the prompt, in the whole conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError, unknown
from jaxmed.prompts.pair import PromptPair
from jaxmed.tokens import Prompt, answer_ids, render, show_tokens

Weighted = list[tuple[str, Callable[[int], float]]]
"""(text, weight of each of its tokens given their number)."""


@dataclass(frozen=True)
class Outcome:
    """How an outcome is read.

    Attributes:
        first_token: answers must be single tokens, read at the last prompt token.
        rule: a key of `readout.RULES`.
        normalised: token scores are log-probabilities, not logits.
        weigh: a pair's answers, weighted.
        targets, foils: the fewest and the most that a pair gives, most None: any number.
        column: of the pairs file, that the texts come from.
        needs_source: whether the source's next-token distribution is part of it.
        unit: of its values.
        differentiable: whether a gradient at the base run says anything: attribution needs that.
    """

    first_token: bool
    rule: str
    normalised: bool
    weigh: Callable[[PromptPair], Weighted]
    targets: tuple[int, int | None] = (0, None)
    foils: tuple[int, int | None] = (0, None)
    column: str = "target"
    needs_source: bool = False
    unit: str = "nats"
    differentiable: bool = True


def _signed(pair: PromptPair) -> Weighted:
    """Every token of a target counts 1, of a foil -1."""
    return [(text, partial(_constant, sign)) for texts, sign in ((pair.target, 1.0), (pair.foil, -1.0)) for text in texts]


def _per_text(pair: PromptPair) -> Weighted:
    """Every target counts equally, and so does every token of it; foils likewise, with a minus."""
    signed = (pair.target, 1.0), (pair.foil, -1.0)
    return [(text, partial(_per_token, sign / len(texts))) for texts, sign in signed for text in texts]


def _targets(pair: PromptPair) -> Weighted:
    return _signed(pair)[: len(pair.target)]


def _response(pair: PromptPair) -> Weighted:
    return [(pair.response or "", partial(_constant, 1.0))]


def _nothing(pair: PromptPair) -> Weighted:
    del pair
    return []


def _constant(weight: float, count: int) -> float:
    del count
    return weight


def _per_token(weight: float, count: int) -> float:
    return weight / count


OUTCOMES: dict[str, Outcome] = {
    "logit-diff": Outcome(True, "sum", False, _signed, (1, 1), (1, 1), unit="logits"),
    "log-odds": Outcome(True, "odds", False, _signed, (1, None), (1, None)),
    "logprob": Outcome(True, "total", True, _targets, (1, None)),
    "prefix-gap": Outcome(False, "sum", True, _per_text, (1, None), (1, None)),
    "sequence-logprob": Outcome(False, "sum", True, _response, column="response"),
    "kl": Outcome(True, "kl", True, _nothing, needs_source=True, differentiable=False),
}

OutcomeName = str | Callable[[jax.Array], jax.Array]
"""A name in `OUTCOMES`, or a function of the logits float32 [V] after the last prompt token."""


def check_outcomes(outcomes: Sequence[OutcomeName], vocabulary: int) -> tuple[OutcomeName, ...]:
    """The outcomes as a tuple.

    Raises:
        UserError: an unknown name (with the nearest ones); a function that is not one from logits float32 [V] to one number.
    """
    for outcome in outcomes:
        if callable(outcome):
            _check_function(outcome, vocabulary)
        elif outcome not in OUTCOMES:
            raise unknown("outcome", outcome, OUTCOMES)
    if not outcomes or len(set(outcomes)) < len(outcomes):
        raise UserError("Give at least one outcome, and each of them once.")
    return tuple(outcomes)


def _check_function(outcome: Callable[[jax.Array], jax.Array], vocabulary: int) -> None:
    """Traces a user's function, which becomes part of a compiled program."""
    wanted = (
        f"An outcome is a function of the logits [V = {vocabulary}] after the prompt's last token that returns one number, in jax.numpy"
    )
    try:
        found = jax.eval_shape(outcome, jax.ShapeDtypeStruct((vocabulary,), jnp.float32))
    except jax.errors.JAXTypeError as error:
        hint = "without float(), if, and, or numpy on its argument, whose value is not known when it is compiled"
        raise UserError(f"{wanted}: {hint}. {outcome_name(outcome)} ended in: {_first_line(error)}") from None
    except Exception as error:  # whatever a user's function raises
        raise UserError(f"{wanted}. {outcome_name(outcome)} ended in: {_first_line(error)}") from None
    if not isinstance(found, jax.ShapeDtypeStruct) or found.shape != () or not jnp.issubdtype(found.dtype, jnp.floating):
        shown = f"{found.dtype} {list(found.shape)}" if isinstance(found, jax.ShapeDtypeStruct) else type(found).__name__
        raise UserError(f"{wanted}. {outcome_name(outcome)} returns {shown}.")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def outcome_name(outcome: OutcomeName) -> str:
    """The name an outcome is stored under."""
    return getattr(outcome, "__name__", repr(outcome)) if callable(outcome) else outcome


@dataclass(frozen=True)
class Answers:
    """A pair's answers as token ids, and their weights in each outcome: `weights[outcome][answer]` is per token."""

    ids: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


def encode_answers(tokenizer: Any, pair: PromptPair, outcomes: Sequence[OutcomeName], form: str = "chat") -> Answers:
    """Tokenises what the outcomes read of a pair, behind its prompts.

    Raises:
        UserError: texts missing; a text of several tokens in a first-token outcome (the message shows the split); a token among
            both targets and foils; a text that changes a prompt's last tokens, or has other tokens behind base than behind source.
    """
    prompts = [render(tokenizer, pair, side, form) for side in ("base", "source")]
    ids: list[tuple[int, ...]] = []
    rows: list[dict[int, float]] = []
    for outcome in outcomes:
        row: dict[int, float] = {}
        if not callable(outcome):
            for text, weight in OUTCOMES[outcome].weigh(pair):
                answer = _encode(tokenizer, pair, prompts, text, outcome)
                if answer not in ids:
                    ids.append(answer)
                index, value = ids.index(answer), weight(len(answer))
                if row.get(index, value) != value:
                    raise UserError(f"pair {pair.id!r}: {text!r} is both a target and a foil of outcome {outcome!r}.")
                row[index] = value
            _check_counts(pair, outcome, list(row.values()))
        rows.append(row)
    return Answers(tuple(ids), tuple(tuple(row.get(i, 0.0) for i in range(len(ids))) for row in rows))


def _encode(tokenizer: Any, pair: PromptPair, prompts: Sequence[Prompt], text: str, outcome: str) -> tuple[int, ...]:
    try:
        answer, other = (tuple(answer_ids(tokenizer, prompt, text)) if text else () for prompt in prompts)
    except UserError as error:
        raise UserError(f"pair {pair.id!r}: {error}") from None
    if answer != other:
        after = f"{show_tokens(tokenizer, answer)} {answer} after base and {show_tokens(tokenizer, other)} {other} after source"
        raise UserError(f"pair {pair.id!r}: {text!r} is {after}. Let both prompts end alike, or begin the text with a space.")
    if not answer:
        column = OUTCOMES[outcome].column
        raise UserError(f"pair {pair.id!r}: outcome {outcome!r} needs the column {column!r}, which is empty.")
    if OUTCOMES[outcome].first_token and len(answer) > 1:
        split = f"{show_tokens(tokenizer, answer)} (ids {', '.join(map(str, answer))})"
        raise UserError(
            f"pair {pair.id!r}: outcome {outcome!r} reads one token, and {text!r} is {len(answer)} here: {split}. "
            "Shorten the text to its first token, or use prefix-gap."
        )
    return answer


def _check_counts(pair: PromptPair, outcome: str, weights: list[float]) -> None:
    """Refuses a pair with fewer or more targets or foils than an outcome takes."""
    kind = OUTCOMES[outcome]
    for what, legal, count in (
        ("target", kind.targets, sum(w > 0 for w in weights)),
        ("foil", kind.foils, sum(w < 0 for w in weights)),
    ):
        fewest, most = legal
        if count < fewest or (most is not None and count > most):
            wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
            several = " Use log-odds for several." if most is not None and count > most else ""
            raise UserError(f"pair {pair.id!r}: outcome {outcome!r} takes {wanted} {what}; the pair has {count}.{several}")
