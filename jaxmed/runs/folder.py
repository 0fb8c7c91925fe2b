"""The folder of a run: what may lie in it, what makes it the same run, who writes to it, and a record of every session.

RUN (run.json) holds `manifest` (all that decides a number or a label), `status` and `sessions`. A session is written when it begins, now
and then while it runs, and on every exit. One process at a time holds the folder; the lock ends with its process, however that ends.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError, all_problems, notice
from jaxmed.files import check_file, read_json, simple, write_json
from jaxmed.hosts import first_tells, leads, several, told_to_end
from jaxmed.memory import return_freed_memory
from jaxmed.runs import signals
from jaxmed.runs.legal import TABLES, Legal, check_folder, check_same, check_space, check_tables, digests_of
from jaxmed.runs.lock import LOCK, RUN, hold, is_record, read_run
from jaxmed.runs.provenance import command, versions

NOTED_EVERY = 10.0
"""Seconds between two records of a session while it runs."""


def seconds_spent(record: Mapping[str, Any]) -> float:
    """Seconds of all sessions of a run."""
    return sum(session.get("seconds", 0.0) if isinstance(session, dict) else session for session in record.get("sessions", []))


def time_of(record: Mapping[str, Any]) -> str:
    """The same in words; how long sessions took that were killed is not known."""
    killed = any(isinstance(one, dict) and one.get("status") == "killed" for one in record.get("sessions", []))
    return f"{'at least ' if killed else ''}{seconds_spent(record):,.0f} s"


def last_versions(record: Mapping[str, Any]) -> dict[str, Any]:
    """Versions of what computed a run, in its last session; of earlier versions' runs, in all."""
    sessions = [session for session in record.get("sessions", []) if isinstance(session, dict)]
    return (sessions or [record])[-1].get("versions", {})


class RunFolder:
    """An open folder, which no other process writes to; or an open file, which holds its record and all results (`open_file`).

    Attributes:
        path: the folder, or the file's.
        file: the file of the record.
        continues: whether it holds a run that goes on.
        ended: status of the run when it was opened: "finished", "interrupted", "failed", "killed"; "new" at its beginning.
        record: what RUN holds.
        measured: names of its tables, whose digests are noted at the end of every session.
    """

    def __init__(self, path: Path, record: dict[str, Any], continues: bool, file: Path | None = None, measured: Sequence[str] = ()):
        self.path, self.record, self.continues, self.file, self.measured = path, record, continues, file or path / RUN, measured
        self.ended = str(record.get("status", "")) if record.get("status") != "running" else "killed"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as stored; of a run that continues, it holds the values to reuse."""
        return self.record["manifest"]

    @classmethod
    @contextmanager
    def open(
        cls, out: Path, manifest: Mapping[str, Any], resume: bool, legal: Legal, needed: int = 0, reused: Sequence[str] = ()
    ) -> Iterator[RunFolder]:
        """Begins or continues a run in `out`, and holds the folder inside the block.

        Args:
            manifest: all that decides a number or a label; a run continues where all of it agrees.
            needed: bytes that a new run will write.
            reused: keys of the manifest that are taken from the stored one instead of compared, such as the chunk size.

        Raises:
            UserError: what `check_folder` raises; a run of another request; no room on the disk; another writer in the folder.
        """
        with ExitStack() as held:
            opened: list[RunFolder] = []

            def begin() -> bool:
                opened.append(held.enter_context(cls._begun(out, manifest, resume, legal, (needed, reused))))
                return opened[0].continues

            continues = bool(first_tells(begin))
            yield opened[0] if opened else cls(out, read_run(out), continues, measured=legal.measured)

    @classmethod
    @contextmanager
    def _begun(
        cls, out: Path, manifest: Mapping[str, Any], resume: bool, legal: Legal, how: tuple[int, Sequence[str]]
    ) -> Iterator[RunFolder]:
        """`open`, in the process that writes."""
        needed, reused = how
        if check_folder(out, resume, legal):  # before the lock, so that a refusal touches nothing
            check_same(out, read_run(out).get("manifest", {}), manifest, reused)
        else:
            check_space(out, needed)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made: {error.strerror or error}. Give another folder; nothing was written.") from None
        with hold(out):
            continues = check_folder(out, resume, legal)
            record = read_run(out) if continues else {"manifest": simple(manifest), "status": "new", "sessions": []}
            if continues:
                check_same(out, record.get("manifest", {}), manifest, reused)
                check_tables(out, record)
            found = cls(out, record, continues, measured=legal.measured)
            if several():
                found.note()  # the others read it
            yield found

    def note(self, **entries: Any) -> None:
        """Keeps entries in RUN."""
        self.record |= entries
        if not leads():
            return
        with signals.delayed():
            write_json(self.file, self.record)

    def tell_damage(self, shown: Sequence[str]) -> None:
        """Says which stored parts of a continued run are damaged; the caller has marked them as not done.

        Raises:
            UserError: the run was finished: its numbers may be in use, so they change at the next --resume alone.
        """
        if not shown:
            return
        if self.ended == "finished":
            fix = "The run was finished. What is damaged is marked as not done now: --resume again computes it."
            raise all_problems(f"{self.path} is damaged", list(shown), fix)
        notice(str(all_problems(f"{self.path} is damaged", list(shown), "It is computed again.")))

    @contextmanager
    def session(self, ended: str = "finished") -> Iterator[Session]:
        """A session of the run. Its record is written at its beginning and on every exit.

        Its status, and the run's, is `ended` at the end of the block; "interrupted" by a signal or Ctrl-C; "failed" by an error.
        """
        earlier = self.record.setdefault("sessions", [])
        if earlier and isinstance(earlier[-1], dict) and earlier[-1].get("status") == "running":
            earlier[-1]["status"] = "killed"
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        session = Session(self, {"started": started, "status": "running", "seconds": 0.0, "versions": versions()})
        session.record |= {"host": platform.node(), "pid": os.getpid(), **command()}
        earlier.append(session.record)
        self.note(status="running")
        try:
            with signals.delayed() if several() else nullcontext():  # one that ends alone leaves the others waiting
                yield session
        except BaseException as error:
            ended = "failed" if isinstance(error, Exception) else "interrupted"
            told = str(error).splitlines()[:1] if isinstance(error, Exception) else []
            with suppress(UserError):  # where the disk is full, what ended the run is the thing to say
                session.close(ended, reason=": ".join([type(error).__name__, *told])[:300])
            raise
        session.close(ended)
        return_freed_memory()


@contextmanager
def open_file(out: Path, manifest: Mapping[str, Any], resume: bool) -> Iterator[RunFolder]:
    """Begins or continues a run whose record and results are one JSON file, and holds the file inside the block.

    Raises:
        UserError: a path that cannot be written; a file that exists, and no `resume`; one of another request; another writer.
    """
    check_file(out)
    if out.exists() and not resume:
        raise UserError(f"--out {out} exists already. Add --resume to continue it, or give another file; nothing was written.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror or error}. Give another file; nothing was written.") from None
    with hold(out.parent, f".{out.name}{LOCK}", out):
        continues = out.exists()
        if continues and not resume:
            raise UserError(f"--out {out} exists already. Add --resume to continue it, or give another file; nothing was written.")
        record = read_json(out, "the record of a run") if continues else {"manifest": simple(manifest), "status": "new", "sessions": []}
        if continues:
            if not is_record(record) or "manifest" not in record:
                raise UserError(f"{out} is no record of a run. Give another file; nothing was written.")
            check_same(out, record["manifest"], manifest)
        yield RunFolder(out.parent, record, continues, out)


class Session:
    """One process's part of a run.

    Attributes:
        record: its entry in RUN: when it began, status, seconds, versions, and its counts.
    """

    def __init__(self, folder: RunFolder, record: dict[str, Any]):
        self.folder, self.record = folder, record
        self._begun = self._noted = time.monotonic()

    def count(self, **done: float) -> None:
        """Adds to the counts of this session after an item was finished, and ends the run where a signal has come to any of its processes.

        Raises:
            Interrupted: see `signals`.
        """
        for name, number in done.items():
            self.record[name] = self.record.get(name, 0) + number
        if time.monotonic() - self._noted > NOTED_EVERY:
            self._write("running")
        if not several():
            signals.check()
        elif number := told_to_end(signals.asked()):
            signals.end_together(number)

    def close(self, status: str, **entries: Any) -> None:
        """Writes how the session ended."""
        ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.record |= {"ended": ended, **entries}
        self._write(status)

    def _write(self, status: str) -> None:
        self._noted = time.monotonic()
        self.record |= {"status": status, "seconds": round(self._noted - self._begun, 3)}
        tables = {TABLES: digests_of(self.folder.path, self.folder.measured)} if self.folder.measured and status != "running" else {}
        self.folder.note(status=status, **tables)
