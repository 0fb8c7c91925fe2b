"""The commands `probe score` and `probe evaluate`: a read-out is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmed.cli import show
from jaxmed.cli.flags import ModelFlags, PlanFlags, SplitFlag, check_absent
from jaxmed.cli.labelled import LabelledFlags, ids_of
from jaxmed.errors import UserError, notice


@dataclass(frozen=True, kw_only=True)
class ProbeFlag:
    """The probe that is applied."""

    probe: Path = Path("probe.json")
    """JSON file of `jaxmed probe fit`."""


@dataclass(frozen=True, kw_only=True)
class ProbeScore(ProbeFlag, ModelFlags, PlanFlags):
    """Scores prompts with a probe: a line of JSON per prompt, batch by batch. An interrupted run leaves OUT.part and no OUT."""

    data: Path | None = None
    """Prompts (.jsonl, .csv, .parquet; column prompt, optional id)."""
    out: Path = Path("scores.jsonl")
    """JSONL file for id, score, probability and flag of every prompt."""
    batch: int = 64
    """Prompts that are scored at once."""

    def run(self) -> None:
        """Checks, scores, writes."""
        from jaxmed.probing.prefixes import check_prefixes, prompts_of
        from jaxmed.probing.probe import read_probe, score
        from jaxmed.prompts.examples import read_examples

        check_absent(self.out)
        probe = read_probe(self.probe)
        if self.data is None:
            raise UserError("Give --data FILE: prompts to score (column prompt).")
        if self.batch < 1:
            raise UserError(f"--batch {self.batch} is at least 1.")
        rows = read_examples(self.data, responses=False)
        model = self.describe()
        check_prefixes(model, probe.prefixes)
        prompts_of(model, rows[:1], probe.prefixes.form)
        show.lines(f"probe score: {model.name}", [f"{len(rows):,} prompts, {len(probe.prefixes.prefixes)} openings"])
        if self.dry_run:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        model, flagged, part_file = self.load(), 0, self.out.with_name(self.out.name + ".part")
        with show.progress("prompts", len(rows), "prompts") as report, part_file.open("w", encoding="utf-8") as file:
            for at in range(0, len(rows), self.batch):
                part = rows[at : at + self.batch]
                scores = score(model, prompts_of(model, part, probe.prefixes.form), probe)
                for line in _lines(part, scores, probe, at):
                    flagged += line["flagged"]
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                report(len(part), len(part), "")
        part_file.replace(self.out)
        show.lines("scored", [f"{flagged:,} of {len(rows):,} prompts are flagged", f"scores: {self.out}"])


def _lines(rows: Sequence[Any], scores: np.ndarray, probe: Any, first: int) -> Iterator[dict[str, Any]]:
    for number, (row, value, p) in enumerate(zip(rows, scores, probe.probability(scores), strict=True), first):
        yield {"id": row.id or str(number), "score": float(value), "probability": float(p), "flagged": bool(value > probe.threshold)}


@dataclass(frozen=True, kw_only=True)
class ProbeEvaluate(ProbeFlag, SplitFlag, LabelledFlags, ModelFlags, PlanFlags):
    """How well a probe tells harmful from benign prompts: ROC, rates, calibration, latency, beside a refusal direction and the length."""

    baseline_split: Literal["", "train", "heldout"] = "train"
    """Split of the same file that the refusal direction is taken from."""
    out: Path | None = None
    """JSON file for what is measured."""

    def run(self) -> None:
        """Checks, scores, measures, prints."""
        from jaxmed.files import write_json
        from jaxmed.probing.measure import AT_FPR, FEWEST, at_threshold, direction_baseline, latency, measure
        from jaxmed.probing.prefixes import check_prefixes
        from jaxmed.probing.probe import as_record, read_probe, score

        check_absent(self.out)
        probe = read_probe(self.probe)
        model = self.describe()
        check_prefixes(model, probe.prefixes)
        sides, trained = self.labelled(self.split), self.labelled(self.baseline_split)
        show.lines(f"probe evaluate: {model.name}", [f"{len(sides[0])} benign and {len(sides[1])} harmful prompts of {self.examples}"])
        if self.dry_run:
            return
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        model = self.load()
        ids, train = (ids_of(model, of, probe.prefixes.form) for of in (sides, trained))
        total = sum(map(len, ids)) * len(probe.prefixes.prefixes)
        with show.progress("scores", total, "openings") as report:
            scores = [score(model, side, probe, lambda done: report(done, done, "")) for side in ids]
        train = _others(train, ids)
        rows = [measure("prefix probe", *scores)]
        if min(map(len, train)) >= FEWEST:
            *directed, layer = direction_baseline(model, (train[0], train[1]), (ids[0], ids[1]))
            rows.append(measure(f"direction, layer {layer}", *directed))
        rows.append(measure("prompt length", *([float(len(one)) for one in side] for side in ids)))
        _tell_seen(probe, ids)
        cut, time = at_threshold(probe, *scores), latency(model, [*ids[0], *ids[1]], probe)
        if self.out is not None:
            write_json(self.out, {"read_outs": [asdict(one) for one in rows], "threshold": cut, "latency": time, "probe": as_record(probe)})
        shown = [[one.name, f"{one.auc:.3f}", _interval(one), f"{one.tpr_at_fpr:.1%}"] for one in rows]
        show.table("read-outs", ["read-out", "AUC", "95 %", f"flagged, {int(AT_FPR * len(ids[0]))} of {len(ids[0])} benign"], shown, left=1)
        lines = [
            f"flags {cut['tpr']:.1%} of harmful and {cut['fpr']:.1%} of benign prompts; F1 {cut['f1']:.3f}",
            f"calibration error {cut['calibration_error']:.3f}, Brier score {cut['brier']:.3f}",
            f"one prompt of {time['prompt_tokens']:.0f} tokens: {time['probe'] * 1e3:.0f} ms, {time['ratio']:.2f} forwards of the prompt",
        ]
        show.lines("at its threshold", lines)


def _interval(one: Any) -> str:
    return "none" if one.low != one.low else f"{one.low:.3f} to {one.high:.3f}"


def _others(train: Sequence[Sequence[np.ndarray]], test: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """The training prompts that are not tested."""
    tested = {ids.tobytes() for side in test for ids in side}
    return [[ids for ids in side if ids.tobytes() not in tested] for side in train]


def _tell_seen(probe: Any, sides: Sequence[Sequence[np.ndarray]]) -> None:
    """Says how many of the tested prompts the probe was made from."""
    from jaxmed.probing.prefixes import prompt_digest

    seen = {*probe.fitted.get("prompts", ()), *probe.prefixes.searched} & {prompt_digest(ids) for side in sides for ids in side}
    if seen:
        notice(f"{len(seen)} of the {sum(map(len, sides))} prompts are those that the probe was made from: its numbers are too good.")
