"""Models without some weights, side by side: what is left of the total and of the answers, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.bridge.job import BridgeJob
from jaxmed.bridge.owners import owned_matrices
from jaxmed.effects.run_ends import run_ends
from jaxmed.evaluation.judges import Judge
from jaxmed.experiments.measure import compare
from jaxmed.experiments.table import Table, continued
from jaxmed.experiments.trials import mask_trial, once, run_trials
from jaxmed.files import read_csv, write_csv
from jaxmed.generation import generate_ids
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.pruning.masks import Mask
from jaxmed.runs.watch import Watch
from jaxmed.statistics import group_means, mean_interval, ratio_interval

PRUNED, PAIRS = "pruned.csv", "pruned-pairs.csv"
WHOLE, MEDIATORS, MATCHED = "as it is", "mediating neurons alone", "random neurons of like size"
AT, ELSEWHERE = "at mediators", "elsewhere"
COLUMNS = ("mask", "pair", "total", "base_score", "source_score")
Units = Mapping[tuple[str, int], np.ndarray]
"""(kind, layer) -> int [k]."""


def part_at(config: ModelConfig, mask: Mask, units: Units, inside: bool = True) -> Mask:
    """The part of a mask at some units; `inside` False: the rest of it. What a group of heads shares is at each of them."""
    layers = {kind: tuple(sorted(layer for one, layer in units if one == kind)) for kind in {one for one, _ in units}}
    empty = np.zeros(0, np.int64)
    found = dict(mask.indices) if not inside else dict.fromkeys(mask.indices, empty)
    for owned in owned_matrices(config, layers):
        at = mask.indices[owned.name]
        mine = np.isin(owned.owner[at], _owners(config, owned.kind, units[owned.kind, owned.layer]))
        found[owned.name] = at[mine] if inside else at[~mine]
    return replace(mask, indices=found, rule={"part of": dict(mask.rule), "inside": inside})


def _owners(config: ModelConfig, kind: str, units: np.ndarray) -> np.ndarray:
    groups = config.heads + units // (config.heads // config.kv_heads)
    return units if kind == "neuron" else np.concatenate([units, groups])


def output_mask(config: ModelConfig, like: Mask, layer: int, neurons: np.ndarray) -> Mask:
    """All weights by which some neurons of a layer write: without them they add nothing, whatever they read."""
    empty = np.zeros(0, np.int64)
    found = dict.fromkeys(like.indices, empty)
    for owned in owned_matrices(config, {"neuron": (layer,)}):
        if owned.path == "down":
            found[owned.name] = np.flatnonzero(np.isin(owned.owner, neurons)).astype(np.int64)
    return replace(like, indices=found, rule={"neurons": [layer, *map(int, neurons)]})


def make_conditions(job: BridgeJob, masks: Mapping[str, Mask], units: Units, matched: Sequence[np.ndarray]) -> dict[str, Mask]:
    """What is pruned, by name; an empty mask is the model as it is.

    Args:
        masks: of the behaviour, the control behaviours, and random ones.
        units: those that mediate, of the gate's layer and of all heads.
        matched: groups of random neurons.
    """
    config, layer, name = job.gate.model.config, job.gate.layout.layer, job.names[0]
    mask = masks[name]
    found = {WHOLE: mask.emptied(), name: mask, f"{name}, {AT}": part_at(config, mask, units)}
    found[f"{name}, {ELSEWHERE}"] = part_at(config, mask, units, inside=False)
    found[MEDIATORS] = output_mask(config, mask, layer, units["neuron", layer])
    found |= {f"{MATCHED} {at + 1}": output_mask(config, mask, layer, neurons) for at, neurons in enumerate(matched)}
    return found | {other: one for other, one in masks.items() if other != name}


def run_conditions(job: BridgeJob, conditions: Mapping[str, Mask], judge: Judge, out: Path, report: Watch) -> Table:
    """Measures every condition that the table does not hold; totals and scores pair by pair are kept beside it."""
    model, table = job.gate.model, continued(("mask",), out / PRUNED, report)
    before = once(model, job.tests)
    pairs = read_pairs(out)

    def measure(trial: Any, pruned: Model) -> dict[str, Any]:
        nonlocal pairs
        name = trial.key[0]
        rows = [{"mask": name, **row} for row in _pairs(job, pruned, judge)]
        pairs = [row for row in pairs if row["mask"] != name] + rows
        write_csv(out / PAIRS, pairs, COLUMNS)
        tested = before() if name == WHOLE else _tests(pruned, job)
        return {**_summed(pairs, name, job), **compare(before(), tested)}

    return run_trials([mask_trial(model, (name,), mask) for name, mask in conditions.items()], measure, table)


def _tests(model: Model, job: BridgeJob) -> Any:
    return once(model, job.tests)()


def _pairs(job: BridgeJob, model: Model, judge: Judge) -> list[dict[str, Any]]:
    """The total of every measured pair on a model, and the scores of its answers to both prompts."""
    heads = job.heads.with_weights(model, job.gate.source_model)
    contrasts, outcomes = [heads.contrasts[number] for number in job.measured], (job.gate.request.outcome,)
    base, source = run_ends(contrasts, outcomes)
    totals = zip(job.measured, source[0] - base[0], strict=True)
    found = [{"pair": job.gate.pairs[number].id, "total": float(total)} for number, total in totals]
    if job.gate.request.spec.tokens:
        for side in ("base", "source"):
            scores = _scores([getattr(one, side) for one in contrasts], job.gate.request.spec.tokens, judge)
            found = [{**row, f"{side}_score": score} for row, score in zip(found, scores, strict=True)]
    return found


def _scores(sides: Sequence[Any], tokens: int, judge: Judge) -> list[float | None]:
    """What a judge says of a model's answers to prompts."""
    model = sides[0].model
    written = generate_ids(model, [side.ids for side in sides], tokens)
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return judge([Example(side.asked) for side in sides], texts, lambda count: None)


def read_pairs(out: Path) -> list[dict[str, Any]]:
    """What was measured pair by pair."""
    return [*read_csv(out / PAIRS, ("mask", "pair"))] if (out / PAIRS).is_file() else []


def by_group(rows: Sequence[Mapping[str, Any]], mask: str, column: str, job: BridgeJob) -> np.ndarray:
    """A column of the measured pairs under a mask, as means over groups [groups], in one order; NaN where a pair has none."""
    of_pair = {row["pair"]: row[column] for row in rows if row["mask"] == mask}
    pairs = [job.gate.pairs[number] for number in job.measured]
    given = [of_pair.get(pair.id, "") for pair in pairs]
    values = np.asarray([np.nan if one in ("", None) else float(one) for one in given])
    return group_means(values[:, None], np.asarray([pair.group for pair in pairs]))[0][:, 0]


def _summed(rows: Sequence[Mapping[str, Any]], mask: str, job: BridgeJob) -> dict[str, Any]:
    """Mean total, its part of the total as it is, and scores, each with an interval of its change."""
    total, whole = (by_group(rows, name, "total", job) for name in (mask, WHOLE))
    part, low, high = ratio_interval(total, whole)
    found: dict[str, Any] = {"total": float(total.mean()), "part": part, "part_low": low, "part_high": high}
    if not job.gate.request.spec.tokens:
        return found
    for side in ("base", "source"):
        after, before = (by_group(rows, name, f"{side}_score", job) for name in (mask, WHOLE))
        known = np.isfinite(after - before)
        low, high = mean_interval((after - before)[known])
        rate = float(after[known].mean()) if known.any() else float("nan")
        found |= {f"{side}_score": rate, f"{side}_low": float(low), f"{side}_high": float(high)}
    return found
