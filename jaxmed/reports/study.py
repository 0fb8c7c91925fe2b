"""The page of a study of pruning, from its saved tables alone."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from jaxmed.errors import UserError, visible
from jaxmed.files import NAME_COLUMNS, check_file, read_csv, write_text
from jaxmed.reports.curves import Rows, draw_attacks, draw_compression, draw_dissociation, draw_pruning_curve, draw_transfer
from jaxmed.reports.html import page_of
from jaxmed.reports.packed import embedded
from jaxmed.reports.style import Figure, number
from jaxmed.runs.folder import last_versions, read_run, seconds_spent

LEAD = (
    "Weights are scored by what their removal does to a behaviour's loss, to first order; a fraction q of each matrix is set to zero, but "
    "for those that other examples need. Losses are means over held-out responses, in nats per token; bars: 95 % intervals over examples."
)
NOTES = (
    "Pruning reduces a behaviour and does not remove it, and neighbouring skills suffer: read every rise beside those of the controls and "
    "of random weights of the same counts.",
    "The bundled sets are mild stand-ins for harmful behaviour. A claim about harm needs the harm sets themselves.",
)
TRANSFER = "Rows: what is pruned for. Columns: what is tested. A behaviour's own weights should matter to it most."
COMPRESSION = (
    "q50: the rule's fraction q of chosen weights at which a behaviour's probability per token is halved (its loss has risen by ln 2); "
    "what is then removed of all weights is fraction_at_q50, since many are spared. Compression: the natural logarithm of the base model's "
    "q50 over this one's; net: minus the control's. Open points (within_limit 0): the perplexity at q50 is beyond the utility limit, so "
    "the behaviour was halved only together with much else."
)
DISSOCIATION = (
    "Generate and explain: losses of responses. Detect: how often the log-odds of yes are higher about a row that shows the behaviour than "
    "about one that does not (0.5 is chance). Refuse: fraction of harmful requests that are declined, by rules."
)
ATTACKS = (
    "Pre-filled: the first tokens of a response are given, the loss of the rest counts. Refusal removed: weights of refusal set to zero, "
    "in memory only. Every rise is over the unpruned model's loss on the same tokens, read in the same way: a pruned model whose rise "
    "shrinks from none to prefill gives the behaviour back once it has begun."
)


def write_study(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a study's folder (default: its report.html), and returns its path. The file works offline.

    Raises:
        UserError: a folder without a study.
    """
    check_file(out or folder / "report.html")
    run = read_run(folder)
    manifest = run.get("manifest", {})
    if "study" not in manifest:
        raise UserError(f"{folder} holds no study. Give the --out folder of `jaxmed study`.")
    parts = [_part(number, *one) for number, one in enumerate(_parts(folder, manifest))]
    facts = [
        ("Models", ", ".join(manifest["models"])),
        ("Behaviours", ", ".join(manifest["behaviours"])),
        ("Controls", ", ".join(manifest["controls"])),
        ("Spared by", f"{manifest['preserve']}, p = {manifest['p']:g}"),
        ("q of masks", f"{manifest['q']:g}"),
        ("Time", f"{seconds_spent(run) / 60:.0f} min" if run.get("status") == "finished" else "not finished"),
    ]
    page = page_of(
        "study.html.j2",
        title=f"Study of {manifest['study']}: {', '.join(manifest['models'])}",
        lead=LEAD,
        facts=facts,
        notes=NOTES,
        parts=parts,
        manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
        versions=", ".join(f"{name} {version}" for name, version in last_versions(run).items()),
        redraw=f"jaxmed report {shlex.quote(str(folder))}",
    )
    out = out or folder / "report.html"
    write_text(out, page)
    return out


Draw = Callable[[Rows], go.Figure]


def _parts(folder: Path, manifest: dict[str, Any]) -> list[tuple[str, str, Path, Draw]]:
    """(title, caption, table, how it is drawn) of what is there."""
    first, last = manifest["models"][0], manifest["models"][-1]
    found = [
        ("Compression", COMPRESSION, folder / "compression.csv", draw_compression),
        (f"Transfer in {first}", TRANSFER, folder / "transfer.csv", draw_transfer),
        (f"Dissociation in {last}", DISSOCIATION, folder / "dissociation.csv", draw_dissociation),
        (f"{last} under attack", ATTACKS, folder / "attacks.csv", draw_attacks),
    ]
    for at, model in enumerate(manifest["models"]):
        for source in (*manifest["behaviours"], *manifest["controls"]):
            table = folder / f"model{at}" / f"curve-{Path(source).stem}" / "curve.csv"
            caption = (
                f"What is left of the probability per token as more weights are chosen for {Path(source).stem}: exp(-rise of the loss). "
                "q50 is about where the line at one half is crossed. First-order predictions: in the table."
            )
            found.append((f"Curve of {Path(source).stem} in {model}", caption, table, draw_pruning_curve))
    return [one for one in found if one[2].is_file()]


def _part(at: int, title: str, caption: str, table: Path, draw: Draw) -> dict[str, Any]:
    rows = read_csv(table)
    columns = list(rows[0])
    figure = Figure(title, caption, draw(rows) if draw is not draw_pruning_curve or len(rows) > 1 else go.Figure())
    return {
        "id": f"part-{at}",
        "title": visible(title),
        "caption": visible(caption),
        "data": embedded(figure.plot),
        "file": f"{table.parent.name}/{table.name}" if table.name == "curve.csv" else table.name,
        "columns": columns,
        "texts": [number for number, name in enumerate(columns) if name in NAME_COLUMNS],
        "rows": [[visible(row[name]) if name in NAME_COLUMNS else _shown(name, row[name]) for name in columns] for row in rows],
    }


def _shown(column: str, value: str) -> str:
    if column in ("weights", "seed", "within_limit") and value:
        return f"{int(float(value)):,}"
    if value in ("inf", "-inf"):
        return "not reached" if column.startswith("q50") else value
    if column in ("q", "fraction", "fraction_at_q50") or column.startswith("q50"):
        return f"{float(value):.3g}" if value and not math.isnan(float(value)) else number(value)
    return number(value)
