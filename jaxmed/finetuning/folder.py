"""The folder of a fine-tuning run: what may lie in it, where a run goes on, its losses and its record."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmed import results
from jaxmed.finetuning import checkpoint
from jaxmed.finetuning.job import Job, manifest
from jaxmed.runs.provenance import versions

LOSSES, CURVE = "losses.csv", "losses.html"
COLUMNS = ("step", "epoch", "loss", "heldout_loss", "gradient_norm", "learning_rate", "scored_tokens")
_OURS = {results.RUN, results.RUN + ".tmp", LOSSES, LOSSES + ".tmp", CURVE, "adapter", "model"}
_BEGINS = (checkpoint.BEGINS, "adapter.partial-", "model.partial-")


def check_folder(out: Path, resume: bool) -> bool:
    """Whether a run can begin or go on in `out`; returns True if it holds one to go on with.

    Raises:
        UserError: foreign files, or a run and no --resume.
    """
    return results.RUN in results.check_contents(out, resume, _OURS, _BEGINS)


def open_run(job: Job, out: Path, resume: bool, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Begins or continues a run in `out`; returns (arrays, progress) of where it stands, or None at its beginning.

    Args:
        like: pytrees of arrays of the same shapes, dtypes and shardings, by name.
    """
    record = manifest(job)
    if not check_folder(out, resume):
        out.mkdir(parents=True, exist_ok=True)
        begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        results.write_json(out / results.RUN, {"manifest": record, "started": begun, "versions": versions(), "status": "running"})
        return None
    results.check_same(out, results.read_run(out)["manifest"], record)
    checkpoint.clean(out)
    held = checkpoint.found(out)
    return checkpoint.restore(held[-1], like) if held else None


def close_run(out: Path, seconds: float, **found: Any) -> None:
    """Notes in run.json that a run is finished, what was `found`, and the seconds it took, those before an interrupt included."""
    record = results.read_run(out)
    record |= {"status": "finished", **found, "seconds": round(record.get("seconds", 0.0) + seconds, 3)}
    results.write_json(out / results.RUN, record)


def write_losses(out: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes losses.csv, whole or not at all."""
    partial = out / (LOSSES + ".tmp")
    with partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        writer.writerows(["" if row[key] != row[key] else row[key] for key in COLUMNS] for row in rows)
    partial.replace(out / LOSSES)
