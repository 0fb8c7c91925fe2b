"""The page of a study of mediation: the claims one by one, then profiles by layer, joint patches, and the figures of gate and bridge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from jaxmed.reports.bridge import TABLES, bridge_figures
from jaxmed.reports.figures import figures
from jaxmed.reports.gate import gate_figures
from jaxmed.reports.record import read
from jaxmed.reports.style import CATEGORICAL, Figure, canvas
from jaxmed.reports.verdicts import finished_run, write_verdicts

LEAD = (
    "Causal mediation: a unit takes its value from the source run while the base run goes on, and the outcome's change is its effect. "
    "Thirds of the layers, and all modules of a kind, are patched together, for single effects do not add up."
)
JOINT = (
    "What all layers of a third add, and all attention and MLP outputs, patched together: mean effect as a share of the mean total, where "
    "the request is read and where the answer is written. Shares need not add up to one: later layers respond to earlier ones."
)


def write_mediation(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a study's folder (default: its report.html), and returns its path. The file works offline.

    Raises:
        UserError: a folder without a finished study.
    """
    manifest = finished_run(folder, "mediation", "study mediation")["manifest"]
    spec, drawn = manifest["mediation"], [Figure("Joint patches", JOINT, _draw_joint(folder))]
    places = {"reading": f"Where it is read ({spec['read_at']})", "writing": f"Where it is written ({spec['write_at']})"}
    for name, title in {**places, "control": "Control pairs"}.items():
        if (folder / name).is_dir():
            record = read(folder / name)
            own = figures(record, record.outcomes[0], 1)
            own = own[:-1] if name == "reading" else own  # base and source end alike, wherever they are patched
            drawn += [Figure(f"{title}: {one.title}", one.caption, one.plot) for one in own]
    drawn += gate_figures(folder / "gate") + bridge_figures(folder / "bridge")
    tables = [folder / "gate" / "gate.csv", *(folder / "bridge" / name for name in TABLES)]
    facts = [("Outcome", read(folder / "writing").outcomes[0]), ("Read at", spec["read_at"]), ("Written at", spec["write_at"])]
    title = f"Mediation in {manifest['model']['name']}"
    shown = ("mediation", "model", "source_model", "pairs")
    return write_verdicts(folder, out, title, LEAD, facts, drawn, tables, shown)


def _draw_joint(folder: Path) -> go.Figure:
    figure = canvas(320, "share of the mean total", "")
    for at, name in enumerate(("reading", "writing")):
        table = read(folder / name).table
        kept = table.control.values == ""
        total = float((table.source_outcome - table.base_outcome).values[kept].mean())
        shares = table.joint.values[kept].mean(axis=0) / total if total else np.full(table.sizes["set"], np.nan)
        bars = go.Bar(y=table.set.values.astype(str), x=shares, orientation="h", name=name, marker={"color": CATEGORICAL[at]})
        figure.add_trace(bars)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure
