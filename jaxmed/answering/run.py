"""Answers under every condition, judged and kept batch by batch, and the table of what each set of units does to them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed.answering.job import AnswersJob, Condition, make_answers
from jaxmed.answering.spec import AnswersSpec
from jaxmed.answering.tables import COLUMNS, EFFECTS, as_table, effect_rows, verdicts
from jaxmed.cache.table import activations
from jaxmed.effects.sets import as_set
from jaxmed.errors import UserError, quoted, unknown
from jaxmed.evaluation.judges import Judge, refusal_rules
from jaxmed.files import read_csv, write_csv
from jaxmed.gating.tables import VERDICTS
from jaxmed.generation import ROWS, Following, generate_ids
from jaxmed.interventions.edits import ANY, CURRENT, Edit, where
from jaxmed.models.model import Model
from jaxmed.prompts.examples import Example
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.folder import RunFolder
from jaxmed.runs.legal import Legal
from jaxmed.runs.watch import RESUMED, Display, no_display

ANSWERS, KEPT = "answers.csv", "answers"
LEGAL = Legal((ANSWERS, EFFECTS, VERDICTS, f"{KEPT}.scores.jsonl", "report.html"), measured=(ANSWERS, EFFECTS, VERDICTS))
Row = tuple[Condition, int, int]
"""(condition, number of the pair, sample)."""


class _Writer:
    """Writes the answers of rows."""

    def __init__(self, job: AnswersJob):
        self.job = job

    def batches(self) -> Iterator[list[Row]]:
        """All rows, in batches whose programs are few: sets of one size run together, each row with its own."""
        job = self.job
        size = {one.name: (len(one.units), tuple(sorted({kind for kind, _, _ in one.units}))) for one in job.sets}
        key = lambda one: (size.get(one.name, (0, ())), one.prompts)  # noqa: E731
        for _, alike in groupby(sorted(job.conditions, key=key), key):
            rows = [(one, pair, sample) for one in alike for pair in range(len(job.pairs)) for sample in range(job.spec.samples)]
            yield from (rows[at : at + ROWS] for at in range(0, len(rows), ROWS))

    def texts(self, rows: Sequence[Row]) -> list[str]:
        """The answers of a batch."""
        job, spec = self.job, self.job.spec
        sides = [getattr(job.contrasts[pair], condition.prompts) for condition, pair, _ in rows]
        seeds = [int(np.random.SeedSequence([spec.seed, pair, sample]).generate_state(1)[0] >> 1) for _, pair, sample in rows]
        how: dict[str, Any] = {"temperature": spec.temperature, "top_p": spec.top_p, "seed": seeds, "rows": ROWS}
        if rows[0][0].name:
            chosen = job.members([condition.name for condition, _, _ in rows])
            if job.follows:
                assert job.source_model is not None
                how |= {"follow": Following(job.source_model, chosen), "where": spec.edited}
            else:
                how |= {"edits": self._edits(chosen, rows, [len(side.ids) for side in sides])}
        written = generate_ids(sides[0].model, [side.ids for side in sides], spec.tokens, **how)
        return [sides[0].model.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """Site -> float32 [P, L, ...]: what every pair's source prompt has at its last token; the mean of all, or zero, as was asked."""
        job = self.job
        sites = sorted(job.members([one.name for one in job.sets]))
        source = job.contrasts[0].source.model
        found = activations(source, [one.source.ids for one in job.contrasts], sites, "last")
        values = {site: found[site].values[:, :, 0] for site in sites}
        change = {"resample": lambda x: x, "mean": lambda x: np.broadcast_to(x.mean(axis=0), x.shape), "zero": np.zeros_like}
        return {site: change[job.spec.patch](x) for site, x in values.items()}

    def _edits(self, chosen: Mapping[str, np.ndarray], rows: Sequence[Row], lengths: Sequence[int]) -> dict[str, Edit]:
        """Every row's units at the values of its pair: at its prompt's last token, at each written one, or both."""
        pairs, edited = np.asarray([pair for _, pair, _ in rows]), self.job.spec.edited
        edits = {}
        for site, mask in chosen.items():
            layer, row, unit = np.nonzero(mask)
            if not len(row):
                continue
            values = self.values[site][pairs[row], layer]  # [E, units, ...], or [E, D] of a site with one unit
            values = values if mask.shape[2] == 1 else values[np.arange(len(row)), unit]
            last = np.asarray(lengths)[row] - 1
            places = {"prompt": [last], "generated": [np.full_like(last, CURRENT)]}
            places["both"] = places["prompt"] + places["generated"]
            twice, count = np.concatenate(places[edited]), len(places[edited])
            entries = where(np.tile(layer, count), twice, ANY if mask.shape[2] == 1 else np.tile(unit, count), np.tile(row, count))
            values = np.tile(values, (count, *(1,) * (values.ndim - 1)))
            gate = np.ones((len(values), *(1,) * (values.ndim - 1)), np.float32)
            edits[site] = Edit(gate, values, np.zeros_like(gate), None, entries)
        return edits


def answers_manifest(job: AnswersJob, settings: Mapping[str, Any] | None, keep_text: bool) -> dict[str, Any]:
    """What makes two runs the same run: the request, the settings of the judge, and whether texts are kept."""
    return {**job.manifest(), "judging": dict(settings or {"judge": "rules"}), "save_text": keep_text}


def run_answers(
    job: AnswersJob,
    out: Path,
    resume: bool = False,
    judge: Judge | None = None,
    settings: Mapping[str, Any] | None = None,
    keep_text: bool = False,
    display: Display = no_display,
) -> None:
    """Answers and judges every condition into `out`: answers.csv, batch by batch, and effects.csv.

    Args:
        judge: of answers; default: refusal rules. `settings` say which, for a resume.
        keep_text: keep the answers; otherwise their hashes alone.

    Raises:
        UserError: `out` holds something else, answers without `resume`, or those of another request; it is in use, or has no room.
    """
    judge, writer, file = judge or refusal_rules(), _Writer(job), out / ANSWERS
    with RunFolder.open(out, answers_manifest(job, settings, keep_text), resume, LEGAL) as folder, folder.session() as session:
        rows: list[dict[str, Any]] = [*read_csv(file, COLUMNS)] if file.is_file() else []
        done = {(row["set"], row["prompts"], row["pair"], row["sample"]) for row in rows}
        total = len(job.conditions) * len(job.pairs) * job.spec.samples
        with display("answers", total, "answers") as report:
            for batch in writer.batches():
                keys = [(one.name, one.prompts, job.pairs[pair].id, str(sample + 1)) for one, pair, sample in batch]
                if all(key in done for key in keys):
                    report(len(batch), 0, RESUMED)
                    continue
                texts = writer.texts(batch)
                scores = judge([Example(_asked(job, one, pair)) for one, pair, _ in batch], texts, lambda count: None)
                _check_scores(scores, len(texts))
                kept = texts if keep_text else [hashlib.sha256(text.encode()).hexdigest() for text in texts]
                rows = [row for row in rows if (row["set"], row["prompts"], row["pair"], row["sample"]) not in set(keys)]
                rows += [_row(key, score, text) for key, score, text in zip(keys, scores, kept, strict=True)]
                write_csv(file, rows, COLUMNS)
                session.count(answers=len(batch))
                report(len(batch), len(batch), batch[0][0].name or "as they are")
        found = effect_rows(job, read_csv(file, COLUMNS))
        write_csv(out / EFFECTS, found)
        write_csv(out / VERDICTS, [asdict(one) for one in verdicts(job, found)])


def _check_scores(scores: Sequence[float | None], count: int) -> None:
    """Raises a UserError for a judge that gives something else than a number from 0 to 1, or None, for every answer."""
    if len(scores) != count:
        raise UserError(f"The judge gives {len(scores)} scores for {count} answers.")
    if wrong := [score for score in scores if score is not None and not 0 <= score <= 1]:
        raise UserError(f"The judge gives the score {quoted(wrong[0])}; scores are from 0 to 1, or None.")


def _row(key: tuple[str, ...], score: float | None, answer: str) -> dict[str, Any]:
    return dict(zip(COLUMNS, (*key, score, answer), strict=True))


def _asked(job: AnswersJob, condition: Condition, pair: int) -> str:
    """What a judge is told was asked."""
    return job.pairs[pair].asked(condition.prompts if job.contrast == "pair" else "base")


def answers(
    model: Model,
    pairs: Sequence[PromptPair],
    sets: Mapping[str, Any],
    form: str = "chat",
    source_model: Model | None = None,
    judge: Judge | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    **spec: Any,
) -> xr.Dataset:
    """How prompts are answered while sets of units are patched.

    Args:
        sets: name -> units, (mediator, layer, index) each.
        source_model: where values come from, token by token, on the text so far; default: the pair's source prompt in the same model.
        judge: (requests, answers, report) -> scores from 0 to 1; default: refusal rules, 1 for a refusal.
        out: folder for answers.csv and effects.csv; a temporary one by default.
        spec: fields of `jaxmed.answering.spec.AnswersSpec`: patch, edited, tokens, samples, temperature, top_p, random, seed.

    Returns:
        `score` float64 [set, pair, sample], of base prompts; `base` and `source` [pair, sample], as they are; by set: `effect` (change of
        the mean score), `low`, `high` (95 %), `p`, `p_adjusted`, `share` of the total.

    Raises:
        UserError: anything in the arguments that cannot be used; nothing has run then.
    """
    if wrong := [name for name in spec if name not in {one.name for one in fields(AnswersSpec)}]:
        raise unknown("argument of jm.answers", wrong[0], [one.name for one in fields(AnswersSpec)])
    chosen = [as_set(name, units) for name, units in sets.items()]
    job = make_answers(model, pairs, chosen, AnswersSpec(**spec), None, form, source_model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "answers" if out is None else Path(out)
        run_answers(job, folder, resume, judge)
        return as_table(job, read_csv(folder / ANSWERS, COLUMNS))
