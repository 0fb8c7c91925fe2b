"""The commands `probe score` and `probe evaluate`: a read-out is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmed.cli import show
from jaxmed.cli.flags import LogFlag, ModelFlags, PlanFlags, ResumeFlag, SplitFlag, check_absent
from jaxmed.cli.labelled import LabelledFlags, ids_of, longest
from jaxmed.errors import NOT_FINITE, UserError, notice
from jaxmed.files import file_digest
from jaxmed.runs.watch import RESUMED


@dataclass(frozen=True, kw_only=True)
class ProbeFlag:
    """The probe that is applied."""

    probe: Path = Path("probe.json")
    """JSON file of `jaxmed probe fit`."""


@dataclass(frozen=True, kw_only=True)
class ProbeScore(ProbeFlag, ModelFlags, LogFlag, ResumeFlag, PlanFlags):
    """Scores prompts with a probe: a line of JSON per prompt, batch by batch. An interrupted run leaves OUT.part, and --resume goes on."""

    data: Path | None = None
    """Prompts (.jsonl, .csv, .parquet; column prompt, optional id)."""
    out: Path = Path("scores.jsonl")
    """JSONL file for id, score, probability and flag of every prompt."""
    batch: int = 64
    """Prompts that are scored at once."""

    def run(self) -> None:
        """Checks, scores, writes."""
        from jaxmed.probing.lines import check_lines, open_lines
        from jaxmed.probing.prefixes import check_prefixes
        from jaxmed.probing.probe import read_probe, score
        from jaxmed.prompts.examples import digest, read_examples

        check_lines(self.out, self.resume)
        probe = read_probe(self.probe)
        if self.data is None:
            raise UserError("Give --data FILE: prompts to score (column prompt).")
        if self.batch < 1:
            raise UserError(f"--batch {self.batch} is at least 1.")
        rows = read_examples(self.data, responses=False)
        model = self.describe()
        check_prefixes(model, probe.prefixes)
        (prompts,) = ids_of(model, [rows], probe.prefixes.form, longest(probe.prefixes))
        show.lines(f"probe score: {model.name}", [f"{len(rows):,} prompts, {len(probe.prefixes.prefixes)} openings"])
        if self.dry_run:
            return
        manifest = {"scores": digest(rows), "probe": file_digest(self.probe), "batch": self.batch, "model": model.record}
        with open_lines(self.out, manifest, self.resume, self.batch) as lines, show.progress("prompts", len(rows), "prompts") as report:
            report(len(lines.kept), 0, RESUMED)
            model, flagged = self.load(), sum(bool(one["flagged"]) for one in lines.kept)
            for at in range(len(lines.kept), len(rows), self.batch):
                part = rows[at : at + self.batch]
                found = _lines(part, score(model, prompts[at : at + self.batch], probe), probe, at)
                lines.add(found)
                flagged += sum(bool(one["flagged"]) for one in found)
                report(len(part), len(part), "")
        show.lines("scored", [f"{flagged:,} of {len(rows):,} prompts are flagged", f"scores: {self.out}"])


def _lines(rows: Sequence[Any], scores: np.ndarray, probe: Any, first: int) -> list[dict[str, Any]]:
    """A line per prompt; of scores that are not finite, nobody can say whether they are flagged."""
    known = np.isfinite(scores)
    if not known.all():
        notice(f"Scores are not all finite, and their prompts are not flagged. {NOT_FINITE}")
    values = zip(rows, scores.tolist(), probe.probability(scores).tolist(), known, strict=True)
    return [
        {"id": row.id or str(number), "score": value, "probability": p, "flagged": value > probe.threshold if finite else None}
        for number, (row, value, p, finite) in enumerate(values, first)
    ]


@dataclass(frozen=True, kw_only=True)
class ProbeEvaluate(ProbeFlag, SplitFlag, LabelledFlags, ModelFlags, LogFlag, PlanFlags):
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
        if min(map(len, sides)) < 2:
            raise UserError(f"--prompts {self.prompts} leaves fewer than two of a kind, and nothing can be measured on them.")
        ids, train = (ids_of(model, of, probe.prefixes.form, longest(probe.prefixes)) for of in (sides, trained))
        show.lines(f"probe evaluate: {model.name}", [f"{len(sides[0])} benign and {len(sides[1])} harmful prompts of {self.examples}"])
        if self.dry_run:
            return
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        model = self.load()
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
