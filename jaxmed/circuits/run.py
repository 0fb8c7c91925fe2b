"""Scores of edges, then circuits on every pair, kept pair by pair; the tables that come of them; and `jm.circuit`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr

from jaxmed.axes import replicated, row_sharding
from jaxmed.circuits.cost import Sizes
from jaxmed.circuits.faithfulness import circuit_outcomes, one_pair
from jaxmed.circuits.formats import Scored, read_scores
from jaxmed.circuits.graph import graph_of
from jaxmed.circuits.job import CircuitJob, make_circuits
from jaxmed.circuits.kept import FOLDER, is_kept, keep, mend, recall
from jaxmed.circuits.listed import Circuit, Found, circuits_of, found_of
from jaxmed.circuits.rows import batch_of, readout_of
from jaxmed.circuits.scores import Ends, point_scores, run_ends
from jaxmed.circuits.spec import METHODS, CircuitSpec
from jaxmed.circuits.tables import CURVE, EDGES, MEASURES, as_dataset, scores_file, write_tables
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.errors import NOT_FINITE, UserError, notice, unknown
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.folder import RunFolder, Session
from jaxmed.runs.legal import Legal
from jaxmed.runs.watch import RESUMED, Display, Watch, no_display

TABLES = (CURVE, MEASURES, EDGES, *(scores_file(method) for method in (*METHODS, "file")))
LEGAL = Legal((FOLDER, *TABLES, "report.html"), measured=TABLES)
ENDS, OUTCOMES = "ends", "outcomes"


def run_circuits(job: CircuitJob, out: Path, resume: bool = False, display: Display = no_display) -> None:
    """Runs a job into `out`. What is finished is on disk at every moment; an interrupted run goes on with `resume`.

    Raises:
        UserError: `out` holds something else, a run without `resume`, or a run of another request; it is in use, or has no room.
    """
    sizes = Sizes(job)
    with RunFolder.open(out, job.manifest(), resume, LEGAL, sizes.costs()[0].written) as folder, folder.session() as session:
        mend(folder)
        with display("scores", sum(map(sizes.of_scores, job.scored)), "pairs") as report:
            _score(sizes, out, session, report)
        found = _found(job, out)
        circuits = circuits_of(job, found)
        with display("circuits", sum(map(sizes.of_circuits, job.measured)), "circuits") as report:
            _measure(sizes, circuits, out, session, report)
        held = [one for pair in job.measured if (one := recall(out, f"circuits-{pair}")) is not None]
        folder.record["identity"] = max(float(np.abs(one[OUTCOMES][:2] - one[ENDS]).max()) for one in held)
        if not all(np.isfinite(one[OUTCOMES]).all() for one in held):
            notice(f"{out}: outcomes of circuits are not all finite, so no circuit is the best. {NOT_FINITE}")
        write_tables(job, found, circuits, np.stack([one[OUTCOMES] for one in held], axis=1), out)


def _score(sizes: Sizes, out: Path, session: Session, report: Watch) -> None:
    """Scores of all pairs that are not kept yet, batch by batch."""
    for pairs, rows in sizes.batches():
        done = all(is_kept(out, f"scores-{pair}") for pair in pairs)
        if not done:
            for pair, arrays in zip(pairs, _scores(sizes.job, pairs, rows), strict=True):
                keep(out, f"scores-{pair}", arrays)
            session.count(scored=len(pairs))
        for pair in pairs:
            report(sizes.of_scores(pair), 0 if done else 1, RESUMED if done else sizes.job.pairs[pair].id)


def _scores(job: CircuitJob, pairs: Sequence[int], rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Of every pair of a batch: outcomes of its two runs [2], and scores [U,Y] by method."""
    model, spec, readout = job.model, job.spec, readout_of(job.model, job.outcome)
    batch = jax.device_put(batch_of([job.contrasts[pair] for pair in pairs], rows), row_sharding(model.mesh))
    ends = run_ends(model.config, model.params, batch, job.shape(pairs[0]).window, readout)
    methods = spec.method if job.given is None else ()
    parts = {method: spec.parts(method) for method in methods}
    totals = {method: np.zeros((rows, *job.graph.real.shape)) for method in methods}
    for part in job.parts:
        scores = np.asarray(point_scores(model.config, model.params, batch, ends, np.float32(part), readout), np.float64)
        for method in methods:
            totals[method] += scores * (part in parts[method])
    outcome = np.asarray(ends.outcome)
    for row in range(len(pairs)):
        means = {method: np.where(job.graph.real, totals[method][row] / len(parts[method]), 0.0).astype(np.float32) for method in methods}
        yield {ENDS: outcome[:, row], **means}


def _found(job: CircuitJob, out: Path) -> Found:
    """Means over the pairs that were scored."""
    ends, totals = [], {method: np.zeros(job.graph.real.shape) for method in job.methods}
    for pair in job.scored:
        held = recall(out, f"scores-{pair}")
        assert held is not None
        ends.append(held[ENDS])
        for method in job.methods if job.given is None else ():
            totals[method] += held[method] / len(job.scored)
    return found_of(job, np.stack(ends, axis=1), totals)


def _measure(sizes: Sizes, circuits: Sequence[Circuit], out: Path, session: Session, report: Watch) -> None:
    """Outcomes of all circuits on the pairs that are not kept yet."""
    masks = np.stack([circuit.chosen for circuit in circuits])
    for pair in sizes.job.measured:
        done = is_kept(out, f"circuits-{pair}")
        if not done:
            outcomes, ends = outcomes_of_pair(sizes, pair, masks)
            keep(out, f"circuits-{pair}", {OUTCOMES: outcomes, ENDS: ends})
            session.count(circuits=len(circuits))
        report(sizes.of_circuits(pair), 0 if done else len(circuits), RESUMED if done else sizes.job.pairs[pair].id)


def outcomes_of_pair(sizes: Sizes, pair: int, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes float32 [C] of circuits bool [C,U,Y] on a pair, in chunks of equal size that the devices share; and [2] of the ordinary runs
    of base and source."""
    job, devices = sizes.job, sizes.devices
    model, shape, readout = job.model, job.shape(pair), readout_of(job.model, job.outcome)
    split, whole = row_sharding(model.mesh), replicated(model.mesh)
    rows = jax.device_put(batch_of([job.contrasts[pair]], devices), split)
    ends: Ends = run_ends(model.config, model.params, rows, shape.window, readout)
    single = jax.device_put(one_pair(ends, rows.reads, 0), whole)
    size, found = sizes.chunk(shape, len(masks)), []
    for at in range(0, len(masks), size):
        chunk = masks[np.minimum(np.arange(at, at + size), len(masks) - 1)]
        found.append(np.asarray(circuit_outcomes(model.config, model.params, single, jax.device_put(chunk, split), readout)))
    return np.concatenate(found)[: len(masks)], np.asarray(ends.outcome)[:, 0]


def outcomes(
    model: Model,
    pairs: Sequence[PromptPair],
    circuits: np.ndarray,
    outcome: OutcomeName = "log-odds",
    form: str = "chat",
    contrast: str = "pair",
) -> np.ndarray:
    """Exact outcomes float32 [circuit, pair] of base's prompts where all edges but those of a circuit carry source's values.

    Args:
        circuits: bool [circuit, sender, receiver], in the order of `jm.circuits.graph_of`; what is no edge may be anything.

    Raises:
        UserError: as `jm.circuit`; circuits of another shape.
    """
    job = make_circuits(model, pairs, CircuitSpec(edges=0), outcome, contrast, form)
    masks = np.asarray(circuits)
    if masks.dtype != bool or masks.ndim != 3 or masks.shape[1:] != job.graph.real.shape:
        shape = f"[circuit, {', '.join(map(str, job.graph.real.shape))}]"
        raise UserError(f"circuits are {masks.dtype} {list(masks.shape)}; this model's are bool {shape}: see jm.circuits.graph_of.")
    return np.stack([outcomes_of_pair(Sizes(job), pair, masks)[0] for pair in job.measured], axis=1)


def circuit(
    model: Model,
    pairs: Sequence[PromptPair],
    outcome: OutcomeName = "log-odds",
    form: str = "chat",
    contrast: str = "pair",
    scores: Scored | str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    **spec: Any,
) -> xr.Dataset:
    """Scores of all edges between heads and MLPs, and how far circuits of the best ones carry base's behaviour. The command's flags.

    A circuit is run by exact joint patching: every edge outside it carries source's value. In the words of Hanna et al. (2024) and of the
    benchmark of Mueller et al. (2025), base is the clean run and source the corrupted one.

    Args:
        outcome: a key of `jaxmed.effects.outcomes.OUTCOMES` with a gradient, or a function of the logits [V] after the prompt.
        scores: of the benchmark's format, or a file of it, to use instead of computing any.
        out: folder for the tables and run.json; a temporary one by default.
        spec: fields of `jaxmed.circuits.spec.CircuitSpec`: method ("eap", "eap-ig" or both), points, edges, nodes, random, apart, seed.

    Returns:
        `score` [scored_by, sender, receiver], in the outcome's sign, NaN where there is no edge; `node_score` [scored_by, sender];
        `in_circuit` bool [scored_by, sender, receiver], what is connected of the circuit of `edges` or `nodes`; `faithfulness` and
        `outcome` [curve, fraction]; `cpr`, `cmd` and `average` [curve], with the coordinates `curve_by`, `rank` and `draw`.

    Raises:
        UserError: anything in the arguments that cannot be used; nothing has run then.
    """
    if wrong := [name for name in spec if name not in {one.name for one in fields(CircuitSpec)}]:
        raise unknown("argument of jm.circuit", wrong[0], [one.name for one in fields(CircuitSpec)])
    if isinstance(method := spec.get("method"), str):
        spec["method"] = (method,)
    given = read_scores(scores, graph_of(model.config)) if isinstance(scores, str | Path) else scores
    job = make_circuits(model, pairs, CircuitSpec(**spec), outcome, contrast, form, given)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "circuit" if out is None else Path(out)
        run_circuits(job, folder, resume)
        return as_dataset(job, folder)
