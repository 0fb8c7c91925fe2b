"""What runs are in a folder and how far each is, read from their records and done markers; no run is disturbed by it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.errors import UserError, notice
from jaxmed.files import is_number
from jaxmed.files.arrays import open_array
from jaxmed.runs.folder import RUN, read_run, seconds_spent
from jaxmed.runs.lock import is_held

MARKERS = ("effects.zarr/done", "done")
"""Where runs keep what is done: uint8 [pair, layer] of sweeps, [prompt] of activations."""
KINDS = ("mediation", "misalignment", "study", "bridge", "gate", "answering", "circuit", "request", "sites", "inputs_axis", "settings")
NAMES = {"request": "sweep", "sites": "activations", "answering": "answers", "inputs_axis": "scores", "settings": "fine-tuning"}
"""Key of a manifest that says what a run is -> its name, where that is another."""
DEPTH = 4
"""Folders below the one that is asked about in which runs are looked for."""


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        folder: where it is.
        kind: what it is: "sweep", "gate", "activations"...; "run" where its manifest does not say.
        status: "running", "finished", "interrupted", "failed", or "killed": begun, and no process holds it any more.
        done, total: items with and without a done marker; None where it keeps none.
        missing: names of items that are not done, such as pairs of which a layer is left.
        seconds: of all sessions.
        counts: of all sessions: passes, layers, steps.
        writer: host and process of the last session.
        seen: when the record was last written.
        command: that began the last session; empty where it was no command.
    """

    folder: Path
    kind: str
    status: str
    done: int | None
    total: int | None
    missing: tuple[str, ...]
    seconds: float
    counts: Mapping[str, float]
    writer: str
    seen: datetime.datetime
    command: str

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**vars(self), "folder": str(self.folder), "missing": list(self.missing), "seen": self.seen.isoformat(timespec="seconds")}


def find_runs(folder: Path) -> list[Status]:
    """Every run in a folder and those below it, by path.

    Raises:
        UserError: no such folder, or no run in it that can be read. Others that cannot are told of.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give the --out folder of a run, or one that holds several.")
    found, problems = [], []
    for one in _folders(folder, DEPTH):
        try:
            found.append(_status(one))
        except UserError as error:
            problems.append(error)
    if problems and not found:
        raise problems[0]
    for problem in problems:
        notice(str(problem))
    if not found:
        raise UserError(f"{folder} holds no run: no {RUN} there or up to {DEPTH} folders below. Give the --out folder of a run.")
    return found


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / RUN).is_file():
        yield folder
    if depth:
        for below in sorted(path for path in folder.iterdir() if path.is_dir() and path.suffix != ".zarr"):
            yield from _folders(below, depth - 1)


def _status(folder: Path) -> Status:
    record = read_run(folder)
    sessions = [one for one in record.get("sessions", []) if isinstance(one, dict)]
    last, manifest = (sessions or [{}])[-1], record.get("manifest", {})
    status = str(record.get("status", "unknown"))
    status = "killed" if status == "running" and not is_held(folder) else status
    kind = next((key for key in KINDS if key in manifest), "run")
    marks = _marks(folder, manifest.get("layers"))
    listed = manifest.get("pairs", manifest.get("prompts"))
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    left = [] if marks is None else np.flatnonzero(~marks.reshape(len(marks), -1).all(axis=1)).tolist()
    counts: dict[str, float] = {}
    for session in sessions:
        for name, value in session.items():
            if is_number(value) and name not in ("pid", "seconds"):
                counts[name] = counts.get(name, 0) + value
    return Status(
        folder,
        NAMES.get(kind, kind),
        status,
        None if marks is None else int(marks.sum()),
        None if marks is None else marks.size,
        tuple(names[at] if at < len(names) else str(at) for at in left),
        seconds_spent(record),
        counts,
        f"{last.get('host', 'unknown')}:{last.get('pid', '?')}",
        datetime.datetime.fromtimestamp((folder / RUN).stat().st_mtime, datetime.UTC),
        str(last.get("command", "")),
    )


def _marks(folder: Path, layers: Any) -> np.ndarray | None:
    """The done markers bool of a run, [pair, layer] or [prompt]: of the layers that it sweeps; None where it has none."""
    for name in MARKERS:
        if (folder / name).is_dir():
            try:
                found = np.asarray(open_array(folder / name, partial=True).read().result()).astype(bool)
            except (ValueError, OSError):
                return None
            swept = found.ndim == 2 and isinstance(layers, list) and layers and all(layer in range(found.shape[1]) for layer in layers)
            return found[:, layers] if swept else found
    return None


def prometheus(runs: list[Status]) -> str:
    """Runs in Prometheus' text format, as its node exporter reads files."""
    rows = {
        "jaxmed_items_done": ("Items with a done marker.", lambda one: one.done),
        "jaxmed_items": ("Items in all.", lambda one: one.total),
        "jaxmed_seconds": ("Seconds of all sessions.", lambda one: one.seconds),
        "jaxmed_running": ("1 while a process holds the run.", lambda one: int(one.status == "running")),
        "jaxmed_seen_seconds": ("When the record was last written, in seconds since 1970.", lambda one: one.seen.timestamp()),
    }
    lines = []
    for name, (told, value) in rows.items():
        lines += [f"# HELP {name} {told}", f"# TYPE {name} gauge"]
        lines += [f'{name}{{run="{_quoted(one.folder)}",kind="{one.kind}"}} {value(one):g}' for one in runs if value(one) is not None]
    return "\n".join(lines) + "\n"


def _quoted(folder: Path) -> str:
    return str(folder).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
