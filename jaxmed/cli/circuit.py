"""The command `circuit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxmed.circuits.spec import CircuitSpec
from jaxmed.cli import show
from jaxmed.cli.contrast import OneOutcomeFlag, PairsFlag, PromptsFlags
from jaxmed.cli.flags import RunFlags
from jaxmed.cli.resumed import check_resumed
from jaxmed.files import read_csv


@dataclass(frozen=True, kw_only=True)
class Circuit(OneOutcomeFlag, PairsFlag, PromptsFlags, RunFlags, CircuitSpec):
    """Scores of all edges between heads and MLPs (EAP, EAP-IG), and how far circuits of the best ones carry base's behaviour: exact runs in
    which every other edge carries source's value, beside random circuits of the same sizes, with the benchmark's CPR and CMD."""

    scores: Path | None = None
    """Scores, or a circuit, in the format of the Mechanistic Interpretability Benchmark (.json), to use instead of computing any."""
    out: Path = Path("jaxmed-circuit")
    """Folder for scores-*.json, curve.csv, circuits.csv, edges.csv and report.html."""

    def run(self) -> None:
        """Checks, plans, scores, runs circuits, draws."""
        from jaxmed.circuits.formats import read_scores
        from jaxmed.circuits.graph import graph_of
        from jaxmed.circuits.job import make_circuits
        from jaxmed.circuits.run import LEGAL, run_circuits
        from jaxmed.reports.circuit import write_circuit
        from jaxmed.runs.legal import check_folder

        check_folder(self.out, self.resume, LEGAL)
        spec = CircuitSpec(**{one.name: getattr(self, one.name) for one in fields(CircuitSpec)})
        spec.check()

        def made(model: Any, pairs: Sequence[Any], _: Any) -> Any:
            given = None if self.scores is None else read_scores(self.scores, graph_of(model.config))
            return make_circuits(model, pairs, spec, self.outcome, self.contrast or "pair", self.form, given)

        _, job = self.checked(self.pairs, made)
        check_resumed(self, LEGAL, (job.model,), job.manifest)
        self._plan(job)
        if self.dry_run:
            return
        run_circuits(job.with_weights(self.load()), self.out, self.resume, show.progress)
        file = write_circuit(self.out)
        self._show()
        show.out.print(f"report: {file}", markup=False)

    def _plan(self, job: Any) -> None:
        from jaxmed.circuits.cost import Sizes
        from jaxmed.distributed import device_name
        from jaxmed.runs.cost import cost_lines, matmul_rate

        sizes = Sizes(job)
        rate = matmul_rate(job.model.config, job.model.mesh, 512)
        what = f"{len(job.graph.places):,} edges" if not job.spec.of_nodes else f"{len(job.graph.senders):,} nodes"
        apart = f" ({len(job.scored)} scored, {len(job.measured)} run)" if job.spec.apart else ""
        lines = [
            f"{len(job.pairs)} pairs{apart}, {what}; scores by {' and '.join(job.methods)}; {job.circuits} circuits on every pair",
            *cost_lines(sizes.costs(self.out if self.resume else None), rate),
        ]
        show.lines(f"circuit: {job.model.name}, {job.model.config.dtype}, {device_name(job.model.mesh)}", lines)

    def _show(self) -> None:
        """Prints the areas and the marked circuits."""
        shown = lambda text: f"{float(text):.3f}" if text else ""  # noqa: E731
        names = ("cpr", "cmd", "faithfulness")
        rows = [
            [f"{row['method']} {row['rank'] or row['draw']}", *(shown(row[name]) for name in names), row["count"], row["connected"]]
            for row in read_csv(self.out / "circuits.csv")
        ]
        show.table("Circuits", ("scores", "CPR", "CMD", "faithfulness of", "edges or nodes", "connected edges"), rows)
