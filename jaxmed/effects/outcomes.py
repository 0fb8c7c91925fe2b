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
import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.transformer import Params, as_logits, final_norm, head
from jaxmed.prompts.pair import PromptPair
from jaxmed.tokens import Packed, Prompt, answer_ids, bucket, render, show_tokens

READ_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
VOCABULARY_BYTES = 48e6
"""Logits of one vocabulary block may take this much memory while the log-normaliser is summed."""


@dataclass(frozen=True)
class Outcome:
    """How an outcome is read.

    Attributes:
        first_token: answers must be single tokens, read at the last prompt token.
        rule: "sum" (weighted sum of token scores), "odds" (logsumexp over targets minus the same over foils), "total" (logsumexp
            over targets), or "kl".
        normalised: token scores are log-probabilities, not logits.
        weigh: pair's answers -> [(text, weight of each of its tokens given their number)].
    """

    first_token: bool
    rule: str
    normalised: bool
    weigh: Callable[[PromptPair], list[tuple[str, Callable[[int], float]]]]


def _targets_and_foils(pair: PromptPair, per_text: bool = False) -> list[tuple[str, Callable[[int], float]]]:
    signed = [(pair.target, 1.0), (pair.foil, -1.0)]
    if per_text:
        return [(text, partial(lambda sign, count, n: sign / (count * n), sign, len(texts))) for texts, sign in signed for text in texts]
    return [(text, partial(lambda sign, n: sign, sign)) for texts, sign in signed for text in texts]


OUTCOMES: dict[str, Outcome] = {
    "logit-diff": Outcome(True, "sum", False, _targets_and_foils),
    "log-odds": Outcome(True, "odds", False, _targets_and_foils),
    "logprob": Outcome(True, "total", True, lambda pair: _targets_and_foils(pair)[: len(pair.target)]),
    "prefix-gap": Outcome(False, "sum", True, lambda pair: _targets_and_foils(pair, per_text=True)),
    "sequence-logprob": Outcome(False, "sum", True, lambda pair: [(pair.response or "", lambda n: 1.0)]),
    "kl": Outcome(True, "kl", True, lambda pair: []),
}

OutcomeName = str | Callable[[jax.Array], jax.Array]
"""A name in `OUTCOMES`, or a function of the logits float32 [V] after the last prompt token."""


def check_outcomes(outcomes: Sequence[OutcomeName]) -> tuple[OutcomeName, ...]:
    """The outcomes as a tuple; a UserError with the nearest names where one is unknown."""
    for outcome in outcomes:
        if not callable(outcome) and outcome not in OUTCOMES:
            raise unknown("outcome", outcome, OUTCOMES)
    if not outcomes or len(set(outcomes)) < len(outcomes):
        raise UserError("Give at least one outcome, and each of them once.")
    return tuple(outcomes)


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
            _check_signs(pair, outcome, list(row.values()))
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
        column = "response" if outcome == "sequence-logprob" else "target"
        raise UserError(f"pair {pair.id!r}: outcome {outcome!r} needs the column {column!r}, which is empty.")
    if OUTCOMES[outcome].first_token and len(answer) > 1:
        split = f"{show_tokens(tokenizer, answer)} (ids {', '.join(map(str, answer))})"
        raise UserError(
            f"pair {pair.id!r}: outcome {outcome!r} reads one token, and {text!r} is {len(answer)} here: {split}. "
            "Shorten the text to its first token, or use prefix-gap."
        )
    return answer


def _check_signs(pair: PromptPair, outcome: str, weights: list[float]) -> None:
    targets, foils = sum(w > 0 for w in weights), sum(w < 0 for w in weights)
    if outcome == "logit-diff" and (targets, foils) != (1, 1):
        raise UserError(f"pair {pair.id!r}: logit-diff takes one target and one foil, not {targets} and {foils}. Use log-odds for several.")
    needed = {"log-odds": (1, 1), "prefix-gap": (1, 1), "logprob": (1, 0)}.get(outcome, (0, 0))
    if targets < needed[0] or foils < needed[1]:
        raise UserError(
            f"pair {pair.id!r}: outcome {outcome!r} needs a target{' and a foil' if needed[1] else ''}; it has {targets} and {foils}."
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reads:
    """What a readout reads of a run; padded, so that pairs share a program.

    Attributes:
        slots: int, window slots whose logits are read; the first is the last prompt token.
        at: int [R], index into `slots` for each answer token.
        token: int [R], the answer tokens.
        weight: float32 [outcome, R]; 0 where an outcome does not read the token.
        source: float32 [V], log-probabilities of the source's next token (for "kl"; else [0]).
    """

    slots: Any
    at: Any
    token: Any
    weight: Any
    source: Any


def make_reads(packed: Packed, answers: Answers, start: int, source: Any = None) -> Reads:
    """The reads of a packed prompt, for a window that begins at column `start`."""
    columns = sorted({column for reader in packed.readers for column in reader} | {packed.prompt - 1})
    at, token, weight = [], [], []
    for number, (answer, reader) in enumerate(zip(answers.ids, packed.readers, strict=True)):
        at += [columns.index(column) for column in reader]
        token += list(answer)
        weight += [[row[number] for row in answers.weights]] * len(answer)
    slots = np.full(bucket(len(columns), READ_BUCKETS), columns[0] - start, np.int32)
    slots[: len(columns)] = np.asarray(columns) - start
    count, size = len(token), bucket(max(len(token), 1), READ_BUCKETS)
    padded = np.zeros((len(answers.weights), size), np.float32)
    padded[:, :count] = np.asarray(weight, np.float32).reshape(count, len(padded)).T
    pad = lambda values: np.asarray(values + [0] * (size - count), np.int32)  # noqa: E731
    return Reads(slots, pad(at), pad(token), padded, np.zeros(0, np.float32) if source is None else source)


@dataclass(frozen=True)
class Readout:
    """The outcomes of a sweep as a function of the last residual stream; hashable, so it can be part of a program."""

    outcomes: tuple[OutcomeName, ...]

    def __call__(self, config: ModelConfig, params: Params, h: jax.Array, reads: Reads) -> jax.Array:
        """h float32 [U,T,D] -> outcomes float32 [outcome, U]."""
        x = final_norm(config, params, h[:, reads.slots])
        known = [OUTCOMES[o] for o in self.outcomes if not callable(o)]
        logits = as_logits(config, contract("UTD,RD->URT", x, head(params)[reads.token]))
        logits = jnp.take_along_axis(logits, reads.at[None, :, None], axis=2)[..., 0]
        scores = logits
        normaliser = expected = jnp.zeros(x.shape[:2])
        if any(outcome.normalised for outcome in known):
            normaliser, expected = _normalise(config, x, head(params), reads.source)
            scores = logits - normaliser[:, reads.at]
        values = []
        for row, outcome in enumerate(self.outcomes):
            if callable(outcome):
                values.append(jax.vmap(outcome)(as_logits(config, contract("UD,VD->UV", x[:, 0], head(params)))))
            else:
                kind = OUTCOMES[outcome]
                values.append(RULES[kind.rule](scores if kind.normalised else logits, reads.weight[row], reads, normaliser, expected))
        return jnp.stack(values).astype(jnp.float32)


def _sum(scores: jax.Array, weight: jax.Array, *rest: Any) -> jax.Array:
    return jnp.sum(scores * weight, axis=-1)


def _total(scores: jax.Array, weight: jax.Array, *rest: Any) -> jax.Array:
    return jax.nn.logsumexp(jnp.where(weight > 0, scores, -jnp.inf), axis=-1)


def _odds(scores: jax.Array, weight: jax.Array, *rest: Any) -> jax.Array:
    return _total(scores, weight) - _total(scores, -weight)


def _kl(scores: jax.Array, weight: jax.Array, reads: Reads, normaliser: jax.Array, expected: jax.Array) -> jax.Array:
    """Minus KL(source || run) at the last prompt token."""
    entropy = -jnp.sum(jnp.exp(reads.source) * reads.source)
    return entropy + expected[:, 0] - normaliser[:, 0]


RULES: dict[str, Callable[..., jax.Array]] = {"sum": _sum, "odds": _odds, "total": _total, "kl": _kl}


def _normalise(config: ModelConfig, x: jax.Array, table: jax.Array, source: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-normaliser of the logits, and their mean under the source's distribution, both [U,T]; in blocks of the vocabulary."""
    count = table.shape[0]
    size = int(min(count, max(128, VOCABULARY_BYTES // (4 * x.shape[0] * x.shape[1]))))
    size = -(-count // -(-count // size))

    def step(number: jax.Array, carry: Any) -> Any:
        top, total, expected = carry
        start = jnp.minimum(number * size, count - size)
        block = jax.lax.dynamic_slice_in_dim(table, start, size)
        logits = as_logits(config, contract("UTD,VD->UTV", x, block))
        new = (start + jnp.arange(size)) >= number * size  # the last block may reach back over the one before
        masked = jnp.where(new, logits, -jnp.inf)
        higher = jnp.maximum(top, masked.max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(masked - higher[..., None]).sum(-1)
        if source.shape[0]:
            share = jnp.where(new, jnp.exp(jax.lax.dynamic_slice_in_dim(source, start, size)), 0.0)
            expected = expected + contract("UTV,V->UT", logits, share)
        return higher, total, expected

    zero = jnp.zeros(x.shape[:2], jnp.float32)
    top, total, expected = jax.lax.fori_loop(0, -(-count // size), step, (zero - jnp.inf, zero, zero))
    return top + jnp.log(total), expected


@partial(jax.jit, static_argnames=("config",))
def next_token(config: ModelConfig, params: Params, h: jax.Array) -> jax.Array:
    """Log-probabilities float32 [V] of the next token, from the last residual stream [D] of a token."""
    return jax.nn.log_softmax(as_logits(config, contract("UD,VD->UV", final_norm(config, params, h[None]), head(params)))[0])


@partial(jax.jit, static_argnames=("config", "readout"))
def read(config: ModelConfig, params: Params, h: jax.Array, reads: Reads, readout: Readout) -> jax.Array:
    """Outcomes [outcome] of one run whose last residual stream at `reads.slots` is h [T,D]."""
    reads = Reads(jnp.arange(h.shape[0]), reads.at, reads.token, reads.weight, reads.source)
    return readout(config, params, h[None], reads)[:, 0]
