"""The page of judged answers under patches, from its saved tables alone: verdicts first, then the figure they rest on."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from jaxmed.files import read_csv
from jaxmed.reports.style import CATEGORICAL, Figure, canvas, label
from jaxmed.reports.verdicts import finished_run, write_verdicts

LEAD = (
    "While base prompts are answered, the units of a set keep other values, and the answers are judged. Every change is paired: the same "
    "prompts, the same random numbers, with and without the patch."
)
CHANGES = (
    "Change of the mean score (with refusal rules: of the refusal rate) of the answers to base prompts. First: the source's side as it "
    "is. Random: as many other units of the same kinds and layers (whole modules: of other layers). Bars: 95 % intervals over groups of "
    "pairs."
)


def write_answers(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of judged answers (default: its report.html), and returns its path. The file works offline.

    Raises:
        UserError: a folder without finished answers.
    """
    manifest = finished_run(folder, "answering", "answers")["manifest"]
    spec = manifest["answering"]
    drawn = f"{spec['samples']} at temperature {spec['temperature']:g}" if spec["temperature"] else "greedy"
    facts = [("Patch", spec["patch"]), ("At", spec["edited"]), ("Answers", drawn), ("Judge", manifest["judging"]["judge"])]
    figure = Figure("What patches do to answers", CHANGES, _draw(read_csv(folder / "effects.csv")))
    title = f"Answers under patches: {manifest['model']['name']}"
    shown = ("answering", "contrast", "sets", "judging", "model", "source_model", "pairs")
    return write_verdicts(folder, out, title, LEAD, facts, [figure], [folder / "effects.csv"], shown)


def _draw(rows: list[dict[str, str]]) -> go.Figure:
    figure = canvas(120 + 34 * len(rows), "change of the mean score", "")
    known = [row for row in rows if row["mean"]]
    ends = [[abs(float(row[end]) - float(row["mean"])) if row[end] else 0.0 for row in known] for end in ("high", "low")]
    bars = go.Bar(
        y=[label(row["set"]) for row in known],
        x=[float(row["mean"]) for row in known],
        orientation="h",
        error_x={"type": "data", "array": ends[0], "arrayminus": ends[1]},
        marker={"color": [CATEGORICAL[2 if row["set"].startswith("random like ") else at > 0] for at, row in enumerate(known)]},
    )
    figure.add_trace(bars)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure
