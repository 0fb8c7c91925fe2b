"""From scores to a mask, by the rules of `rule.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.models.named_weights import kind_of
from jaxmed.pruning.masks import Mask
from jaxmed.pruning.rule import Rule
from jaxmed.pruning.scores import Scores


def needs_weights(rule: Rule) -> bool:
    """Whether a rule reads the weights beside the scores."""
    return "wanda" in (rule.score, rule.spare if rule.p else "") or rule.score == "magnitude"


def select(
    scores: Scores,
    rule: Rule | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    tag: str = "",
    preserve: Scores | None = None,
) -> Mask:
    """The mask of a rule.

    Args:
        weights: matrix -> values, for rules that read them.
        tag: what the mask is for.
        preserve: scores of a preserve set that was scored apart, for several behaviours; None: those in `scores`.

    Raises:
        UserError: values out of range; layers or matrices that the model does not have; kinds that were not scored; preserve
            scores of other weights.
    """
    rule = rule or Rule()
    rule.check()
    preserve = preserve or scores
    if (preserve.weights, preserve.shapes) != (scores.weights, scores.shapes):
        raise UserError(f"The preserve scores are of other weights ({preserve.model!r}) than the behaviour's ({scores.model!r}).")
    names = _chosen_matrices(scores, rule)
    if needs_weights(rule) and weights is None:
        raise UserError(f"The rule {rule.score!r} with {rule.spare!r} reads the weights too: give the model.")
    chosen = _top(scores, names, rule, rule.q, rule.skip, lambda name, at: _behaviour_score(scores, rule, weights, name, at))
    if rule.p and rule.spare != "none":
        spared = _top(scores, names, rule, rule.p, 0.0, lambda name, at: _preserve_score(preserve, rule, weights, name))
        chosen = {name: np.setdiff1d(chosen[name], spared[name], assume_unique=True) for name in names}
    empty = np.zeros(0, np.int64)
    indices = {name: chosen.get(name, empty) for name in scores.shapes}
    return Mask(indices, scores.shapes, scores.model, scores.weights, dataclasses.asdict(rule), tag)


def random_like(mask: Mask, seed: int = 0) -> Mask:
    """A mask of the same counts per matrix, drawn at random."""
    rng = np.random.default_rng(seed)
    drawn = {
        name: np.sort(rng.choice(int(np.prod(mask.shapes[name])), count, replace=False)).astype(np.int64)
        for name, count in mask.counts().items()
    }
    return Mask(drawn, mask.shapes, mask.model, mask.weights, {"random_like": dict(mask.rule), "seed": seed}, mask.tag)


def select_like(mask: Mask, scores: Scores, preserve: Scores | None = None) -> Mask:
    """A mask of other scores with the same counts per matrix, by the same rule: the highest ranked weights that it does not spare.

    Args:
        mask: of `select`, ranked per matrix.
        preserve: as `select` takes it.

    Raises:
        UserError: a mask that no rule per matrix made; scores of other weights; a matrix with fewer weights than are wanted.
    """
    rule, preserve, chosen = _rule_of(mask), preserve or scores, {}
    if not scores.weights == preserve.weights == mask.weights:
        raise UserError(f"Mask and scores are of different weights ({mask.model!r}, {scores.model!r}, {preserve.model!r}).")
    for name, count in mask.counts().items():
        empty, values = np.zeros(0, np.int64), _behaviour_score(scores, rule, None, name, 0).ravel() if count else np.zeros(0)
        spares = count and rule.p and rule.spare != "none"
        spared = _band(_preserve_score(preserve, rule, None, name).ravel(), rule.p, 0.0) if spares else empty
        if count + len(spared) > values.size and count:
            raise UserError(f"{name} has {values.size - len(spared)} weights that are not spared; {count} are wanted.")
        near = np.setdiff1d(_highest(values, count + len(spared)), spared, assume_unique=True)
        chosen[name] = near[_highest(values[near], count)]
    return Mask(chosen, mask.shapes, mask.model, mask.weights, {"like": dict(mask.rule)}, mask.tag)


def _rule_of(mask: Mask) -> Rule:
    """The rule that made a mask."""
    try:
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in mask.rule.items()}
        rule = Rule(**given)
    except TypeError:
        raise UserError("The mask was made by no rule, so none can be followed. Give one of `select`.") from None
    if rule.ranking != "matrix" or rule.skip or needs_weights(rule) or rule.score == "random":
        raise UserError("Counts per matrix are followed by a rule that ranks scores per matrix and skips nothing.")
    return rule


def layer_number(name: str) -> int:
    """The layer in a matrix's name: its first part that is a number."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def _chosen_matrices(scores: Scores, rule: Rule) -> list[str]:
    layers = sorted({layer_number(name) for name in scores.shapes})
    kinds = sorted({kind_of(name) for name in scores.shapes})
    for layer in rule.layers:
        if layer not in layers:
            raise UserError(f"There is no layer {layer}; legal: 0 to {layers[-1]}.")
    for kind in rule.matrices:
        if kind not in kinds:
            raise unknown("matrix", kind, kinds)
    return [
        name
        for name in scores.shapes
        if (not rule.layers or layer_number(name) in rule.layers) and (not rule.matrices or kind_of(name) in rule.matrices)
    ]


def _behaviour_score(scores: Scores, rule: Rule, weights: Any, name: str, at: int) -> np.ndarray:
    if rule.score == "random":
        return np.random.default_rng((rule.seed, at)).random(scores.shapes[name], np.float32)
    if rule.score == "magnitude":
        return -np.abs(np.asarray(weights[name], np.float32))
    if rule.score == "wanda":
        return _wanda(scores, "behaviour", weights, name)
    found = scores.read("behaviour_absolute" if rule.score == "absolute" else "behaviour_signed", name)
    return -found if rule.score == "signed" else found


def _preserve_score(scores: Scores, rule: Rule, weights: Any, name: str) -> np.ndarray:
    return _wanda(scores, "preserve", weights, name) if rule.spare == "wanda" else scores.read("preserve_absolute", name)


def _wanda(scores: Scores, which: str, weights: Any, name: str) -> np.ndarray:
    inputs = scores.read(f"{which}_inputs", name)
    wide = inputs[None, :] if scores.inputs_axis == 1 else inputs[:, None]
    return np.abs(np.asarray(weights[name], np.float32)) * wide


def _top(scores: Scores, names: list[str], rule: Rule, fraction: float, skip: float, read: Any) -> dict[str, np.ndarray]:
    """Matrix -> ascending flat indices of the highest entries, ranked as the rule says; equal entries by their index."""
    if rule.ranking == "global":
        return _top_of_all(scores, names, fraction, skip, read)
    found = {}
    for at, name in enumerate(names):
        values = read(name, at)
        if rule.ranking == "matrix":
            found[name] = _band(values.ravel(), fraction, skip)
        else:
            rows = values if scores.inputs_axis == 1 else values.T
            flat = np.arange(values.size).reshape(values.shape)
            flat = flat if scores.inputs_axis == 1 else flat.T
            chosen = [flat[row][_band(rows[row], fraction, skip)] for row in range(len(rows))]
            found[name] = np.sort(np.concatenate(chosen)).astype(np.int64)
    return found


def _band(values: np.ndarray, fraction: float, skip: float) -> np.ndarray:
    """Ascending indices of int(fraction * size) entries, after int(skip * size) higher ones."""
    first = int(skip * values.size)
    return _highest(values, first + int(fraction * values.size), first)


def _highest(values: np.ndarray, stop: int, first: int = 0) -> np.ndarray:
    """Ascending indices of the entries ranked from `first` to below `stop`, highest first; equal entries by their index."""
    if stop == 0:
        return np.zeros(0, np.int64)
    near = np.arange(values.size) if stop >= values.size else _likely(values, stop)
    if len(near) > stop:
        edge = -np.partition(-values[near], stop - 1)[stop - 1]
        near = near[values[near] >= edge]
    order = near[np.argsort(-values[near], kind="stable")]
    return np.sort(order[first:stop]).astype(np.int64)


SAMPLE = 1 << 16


def _likely(values: np.ndarray, stop: int) -> np.ndarray:
    """Ascending indices of some entries that the `stop` highest and all their equals are among: those above an edge seen in a sample."""
    sample = values[:: max(1, values.size // SAMPLE)]
    rank = 2 * int(stop / values.size * len(sample)) + 16
    if rank < len(sample) // 2:
        near = np.nonzero(values >= -np.partition(-sample, rank - 1)[rank - 1])[0]
        if len(near) >= stop:
            return near
    return np.arange(values.size)


def _top_of_all(scores: Scores, names: list[str], fraction: float, skip: float, read: Any) -> dict[str, np.ndarray]:
    """The same over all matrices together: every matrix hands in no more than could be chosen."""
    total = sum(int(np.prod(scores.shapes[name])) for name in names)
    first = int(skip * total)
    stop = first + int(fraction * total)
    held: list[tuple[int, np.ndarray, np.ndarray]] = []
    edge = -np.inf
    for at, name in enumerate(names):
        values = read(name, at).ravel()
        keep = np.nonzero(values >= edge)[0]
        if len(keep) > stop:
            keep = keep[_highest(values[keep], stop)]
        held.append((at, keep, values[keep]))
        everything = np.concatenate([one for _, _, one in held])
        if len(everything) > 4 * stop > 0:
            edge = -np.partition(-everything, stop - 1)[stop - 1]
            held = [(number, indices[one >= edge], one[one >= edge]) for number, indices, one in held]
    values = np.concatenate([one for _, _, one in held])
    order = np.argsort(-values, kind="stable")[first:stop]
    chosen = np.zeros(len(values), bool)
    chosen[order] = True
    bounds = np.cumsum([0, *(len(one) for _, _, one in held)])
    return {names[at]: np.sort(indices[chosen[bounds[i] : bounds[i + 1]]]) for i, (at, indices, _) in enumerate(held)}
