"""What a group of neurons does to the text: answers while it is clamped, judged, beside random groups, and what the clamp costs.

A logit outcome is not what a model writes. While prompts are answered, the group keeps its mean value in the other run: at the prompt's
last token and at every token that is written. Means are of the pairs that chose the group; prompts are of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.effects.sets import read_sets
from jaxmed.evaluation.judges import Judge
from jaxmed.evaluation.perplexity import Perplexity, perplexity, perplexity_ratio
from jaxmed.files import read_csv, read_json, write_csv
from jaxmed.gating.cases import Case, Layout
from jaxmed.gating.job import GateJob
from jaxmed.gating.verdicts import ABSENT, DESCRIBED, FEW, NOT_SUPPORTED, SPARSE, SUPPORTED, UNDECIDED, Verdict
from jaxmed.generation import generate_ids
from jaxmed.interventions.edits import CURRENT, Edit, resample, where
from jaxmed.prompts.examples import Example
from jaxmed.runs.watch import RESUMED, Watch
from jaxmed.statistics import group_means, leaves_out_zero, mean_interval

ANSWERS, PERPLEXITY = "answers.csv", "perplexity.csv"
UNIT = "change of the refusal rate"
COLUMNS: tuple[str, ...] = ("half", "group", "values", "prompts", "pair", "score")


@dataclass(frozen=True)
class Clamp:
    """A condition.

    Attributes:
        group: "none", "top" or "matched".
        values: the run whose mean values the group keeps, "source" or "base"; empty for none.
        prompts: the run whose prompts are answered.
    """

    group: str
    values: str
    prompts: str


CLAMPS = (
    *(Clamp("none", "", prompts) for prompts in ("base", "source")),
    *(Clamp(group, "source", "base") for group in ("top", "matched")),
    *(Clamp(group, "base", "source") for group in ("top", "matched")),
    Clamp("top", "source", "source"),
)
"""All conditions: the effect on base prompts, its reverse, and what the same clamp does to prompts that need none."""


@dataclass(frozen=True)
class Judging:
    """Who judges answers, and the settings that decide the scores: they make two studies the same."""

    judge: Judge
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """What is clamped in a half.

    Attributes:
        top, matched: int [k], neurons.
        values: "base" or "source" -> float [F], means of every neuron over the pairs that chose.
    """

    top: np.ndarray
    matched: np.ndarray
    values: dict[str, np.ndarray]


def group_size(layout: Layout, k: int | None) -> int:
    """How many neurons are clamped: as many as suffice, where these are few; else as many as may be called few."""
    most = max(at for at in layout.matchable if at <= max(FEW, SPARSE * layout.neurons))
    return k if k is not None and k <= most else most


def read_group(job: GateJob, out: Path, half: int, k: int) -> Group:
    """What the pairs of the other half have chosen."""
    sets = {one.name: [index for _, _, index in one.units] for one in read_sets(out / f"sets{half + 1}.json")}
    values = read_json(out / f"values{half + 1}.json", "mean values of neurons")
    top, matched = (np.asarray(sets[Case(role, "effect", k).name]) for role in ("top", "matched"))
    return Group(top, matched, {side: np.asarray(values[side], np.float32) for side in ("base", "source")})


def clamp_edits(layer: int, group: Group, clamp: Clamp, lengths: Sequence[int]) -> dict[str, Edit] | None:
    """The clamp as edits of a batch of prompts with these numbers of tokens: at each prompt's last token, and at every written one."""
    if clamp.group == "none":
        return None
    neurons = getattr(group, clamp.group)
    row, place, number = (x.ravel() for x in np.indices((len(lengths), 2, len(neurons))))
    last = np.asarray(lengths)[row] - 1
    entries = where(layer, np.where(place == 0, last, CURRENT), neurons[number], row)
    values = group.values[clamp.values][neurons[number]]
    return {"neuron": Edit(np.ones_like(values), values, np.zeros_like(values), None, entries)}


def run_clamps(job: GateJob, groups: Sequence[Group], judge: Judge, out: Path, report: Watch) -> None:
    """Answers and judges every condition of both halves, and keeps each as soon as it is done; what the file holds is not done again."""
    file = out / ANSWERS
    rows: list[dict[str, Any]] = [*read_csv(file, COLUMNS)] if file.is_file() else []
    for half, group in enumerate(groups):
        tested = np.flatnonzero(job.counted & (job.halves == half))
        for clamp in CLAMPS:
            key = (str(half + 1), clamp.group, clamp.values, clamp.prompts)
            if any(tuple(row[name] for name in COLUMNS[:4]) == key for row in rows):
                report(len(tested), 0, RESUMED)
                continue
            scores = _scores(job, group, clamp, tested, judge)
            ids = [job.pairs[number].id for number in tested]
            rows += [dict(zip(COLUMNS, (*key, name, score), strict=True)) for name, score in zip(ids, scores, strict=True)]
            write_csv(file, rows, COLUMNS)
            report(len(tested), len(tested), "")


def _scores(job: GateJob, group: Group, clamp: Clamp, tested: np.ndarray, judge: Judge) -> list[float | None]:
    """What a judge says of the answers to one side of the pairs numbered `tested`."""
    sides = [getattr(job.singles["neurons"].contrasts[number], clamp.prompts) for number in tested]
    edits = clamp_edits(job.layout.layer, group, clamp, [len(side.ids) for side in sides])
    model = sides[0].model
    written = generate_ids(model, [side.ids for side in sides], job.request.spec.tokens, edits=edits)
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return judge([Example(side.asked) for side in sides], texts, lambda count: None)


def clamp_perplexity(job: GateJob, groups: Sequence[Group], out: Path) -> list[Perplexity]:
    """Perplexity on a text as it is, and with each half's group at its mean source values at every token; nothing without a text. What the
    file holds is not measured again."""
    text, file = job.request.spec.text, out / PERPLEXITY
    if not text:
        return []
    edits = [resample("neuron", group.values["source"][group.top], layer=job.layout.layer, unit=group.top) for group in groups]
    rows: list[dict[str, Any]] = [*read_csv(file, ("clamp",))] if file.is_file() else []
    found = []
    for name, one in (("none", None), *((f"half {half + 1}", edit) for half, edit in enumerate(edits))):
        losses = [[float(row["loss"]), float(row["tokens"])] for row in rows if row["clamp"] == name]
        measured = Perplexity.of(np.asarray(losses)) if losses else perplexity(job.model, text, one)
        if not losses:
            rows += [{"clamp": name, "paragraph": at, "loss": loss, "tokens": int(n)} for at, (loss, n) in enumerate(measured.losses)]
            write_csv(file, rows)
        found.append(measured)
    return found


def clamp_verdicts(job: GateJob, out: Path, k: int, texts: Sequence[Perplexity]) -> list[Verdict]:
    """What the clamp does to refusals, and what it costs."""
    by = _by_group(job, read_csv(out / ANSWERS, COLUMNS))
    base, source, same = (by[clamp] for clamp in (*CLAMPS[:2], CLAMPS[-1]))
    split, verdicts = mean_interval(base - source), []
    for values, prompts, before in (("source", "base", base), ("base", "source", source)):
        top, matched = (by[Clamp(group, values, prompts)] for group in ("top", "matched"))
        claim = f"clamping {k} neurons at {values}'s values changes the answers to {prompts} prompts"
        verdicts.append(_changed(claim, before, top, matched, split))
    low, high = mean_interval(same - source)
    ratios = " and ".join("{:.3f} ({:.3f} to {:.3f})".format(*perplexity_ratio(texts[0], after)) for after in texts[1:])
    lost = f"; perplexity on {job.request.spec.text} becomes {ratios} times what it was, half by half" if ratios else ""
    why = f"source prompts are refused {source.mean():.0%} as they are, {same.mean():.0%} with the clamp that base prompts get{lost}"
    cost = float((same - source).mean())
    return [*verdicts, Verdict("what the clamp costs", DESCRIBED, UNIT, why, cost, float(low), float(high))]


def _by_group(job: GateJob, rows: Sequence[dict[str, Any]]) -> dict[Clamp, np.ndarray]:
    """Mean scores of every group of pairs whose answers all have one, condition by condition: [groups] each, in one order."""
    scores: dict[str, dict[Clamp, float]] = {}
    for row in rows:
        if row["score"] != "":
            scores.setdefault(row["pair"], {})[Clamp(row["group"], row["values"], row["prompts"])] = float(row["score"])
    whole = [(pair.group, scores[pair.id]) for pair in job.pairs if len(scores.get(pair.id, {})) == len(CLAMPS)]
    names = np.asarray([name for name, _ in whole])
    return {clamp: group_means(np.asarray([[found[clamp]] for _, found in whole]), names)[0][:, 0] for clamp in CLAMPS}


def _changed(claim: str, before: np.ndarray, top: np.ndarray, matched: np.ndarray, split: tuple[Any, Any]) -> Verdict:
    """Whether the group, rather than random ones, changes how often prompts are refused."""
    (low, high), more = mean_interval(top - before), mean_interval(top - matched)
    why = (
        f"refused {before.mean():.0%} as they are, {top.mean():.0%} clamped, {matched.mean():.0%} with random neurons of like size clamped"
    )
    clear = leaves_out_zero(low, high) and leaves_out_zero(*more)
    answer = UNDECIDED if not clear else SUPPORTED if (low > 0) == (more[0] > 0) else NOT_SUPPORTED
    if np.isnan(low):
        answer, why = UNDECIDED, f"too few groups for an interval; {why}"
    elif not leaves_out_zero(*split):
        answer, why = ABSENT, f"base and source prompts are refused equally often; {why}"
    return Verdict(claim, answer, UNIT, why, float((top - before).mean()), float(low), float(high))
