"""Beam search for prefixes: tokens are added that benign prompts make likelier than harmful ones do, or the other way round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.batching.next_tokens import next_token_sums
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.probing.prefixes import AGREE, REFUSE, Prefix, PrefixSet, prompt_digest
from jaxmed.probing.spec import SearchSpec

SIGN = {AGREE: 1.0, REFUSE: -1.0}
"""Of the gap mu_benign - mu_harmful: agreement is likelier after benign prompts, refusal after harmful ones."""


@dataclass(frozen=True)
class _Beam:
    """An opening on the way.

    Attributes:
        ids: its tokens.
        total: mean over benign, and over harmful prompts, of its log-probability, in nats.
    """

    ids: tuple[int, ...]
    total: tuple[float, float]

    def gap(self, kind: str) -> float:
        """How far it tells the prompts apart, per token, in the kind's direction."""
        return SIGN[kind] * (self.total[0] - self.total[1]) / len(self.ids)


def writable(model: Model) -> np.ndarray:
    """bool [V]: tokens that an opening may have: no control tokens, and text that can be shown."""
    special, tokenizer = set(model.tokenizer.all_special_ids), model.tokenizer
    allowed = np.zeros(model.config.vocabulary, bool)
    for token in range(min(len(tokenizer), model.config.vocabulary)):
        text = tokenizer.decode([token])
        allowed[token] = token not in special and bool(text) and text.replace("\n", " ").isprintable() and "\ufffd" not in text
    return allowed


def search(
    model: Model,
    benign: Sequence[np.ndarray],
    harmful: Sequence[np.ndarray],
    spec: SearchSpec | None = None,
    form: str = "chat",
    report: Callable[[int], None] = lambda done: None,
) -> PrefixSet:
    """The prefixes with the largest gaps, at most one of those that continue each other.

    mu_C(s) = mean over prompts x of C of log p(s | x) / len(s), and the gap is mu_benign(s) - mu_harmful(s) (Yang et al. 2025). Beams of
    one length run together; every prompt runs once for all of them.

    Args:
        benign, harmful: token ids int [T] each.
        report: called with the number of (prompt, opening) after every batch.

    Raises:
        UserError: no prompts of a class; numbers out of range; no token is plausible.
    """
    spec = spec or SearchSpec()
    spec.check()
    if not len(benign) or not len(harmful):
        raise UserError("A search needs benign and harmful prompts (column kind: benign, harmful).")
    allowed, beams = writable(model), {kind: [_Beam((), (0.0, 0.0))] for kind in SIGN}
    found: dict[str, list[_Beam]] = {kind: [] for kind in SIGN}
    for _ in range(spec.length):
        after = _next_means(model, benign, harmful, beams, report)
        for kind, several in beams.items():
            beams[kind] = _extended(kind, several, after[kind], allowed, spec)
            found[kind] += beams[kind]
        if not any(beams.values()):
            break
    chosen = [_prefix(model, kind, one) for kind in SIGN for one in _apart(found[kind], kind, spec.keep)]
    if len({one.kind for one in chosen}) < len(SIGN):
        raise UserError(f"No opening costs {spec.floor:g} nats per token or less. Give a larger --floor.")
    return PrefixSet(tuple(chosen), form, frozenset(map(prompt_digest, [*benign, *harmful])))


def _next_means(model: Model, benign: Any, harmful: Any, beams: dict[str, list[_Beam]], report: Any) -> dict[str, np.ndarray]:
    """Kind -> mean log-probabilities float64 [beams, 2, V] of every next token, over benign and over harmful prompts."""
    every = [one for several in beams.values() for one in several]
    texts, groups = [], []
    for number, prompts in enumerate((benign, harmful)):
        for prompt in prompts:
            texts += [(prompt, np.asarray(one.ids, np.int32)) for one in every]
            groups += [at * 2 + number for at in range(len(every))]
    sums = next_token_sums(model, texts, groups, 2 * len(every), report).reshape(len(every), 2, -1)
    means, at, found = sums / np.asarray([len(benign), len(harmful)])[:, None], 0, {}
    for kind, several in beams.items():
        found[kind] = means[at : at + len(several)]
        at += len(several)
    return found


def _extended(kind: str, beams: Sequence[_Beam], after: np.ndarray, allowed: np.ndarray, spec: SearchSpec) -> list[_Beam]:
    """The best openings with one token more: the largest gap among the plausible."""
    if not beams:
        return []
    totals = np.asarray([one.total for one in beams])[:, :, None] + after  # [beams, 2, V]
    count = len(beams[0].ids) + 1
    typical = totals[:, 0 if kind == AGREE else 1] / count
    gap = np.where(allowed & (typical >= -spec.floor), SIGN[kind] * (totals[:, 0] - totals[:, 1]) / count, -np.inf)
    order = np.argsort(-gap, axis=None, kind="stable")[: spec.beams]
    places = [tuple(int(i) for i in np.unravel_index(flat, gap.shape)) for flat in order if np.isfinite(gap.flat[flat])]
    return [_Beam((*beams[at].ids, token), (float(totals[at, 0, token]), float(totals[at, 1, token]))) for at, token in places]


def _apart(found: Sequence[_Beam], kind: str, keep: int) -> list[_Beam]:
    """The openings with the largest gaps, none of which begins as another one does."""
    chosen: list[_Beam] = []
    for one in sorted(found, key=lambda beam: -beam.gap(kind)):
        begins = (one.ids[: len(other.ids)] == other.ids or other.ids[: len(one.ids)] == one.ids for other in chosen)
        if one.gap(kind) > 0 and not any(begins):
            chosen.append(one)
        if len(chosen) == keep:
            break
    return chosen


def _prefix(model: Model, kind: str, one: _Beam) -> Prefix:
    means = one.total[0] / len(one.ids), one.total[1] / len(one.ids)
    return Prefix(kind, model.tokenizer.decode(list(one.ids)), one.ids, means)
