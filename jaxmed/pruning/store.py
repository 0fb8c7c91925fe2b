"""A folder of scores: run.json, and one array per kind and matrix; finished passes alone count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.errors import UserError, notice
from jaxmed.files import ArrayLayout, open_array
from jaxmed.files.arrays import reason
from jaxmed.files.chunk_sums import MOVED, sum_of
from jaxmed.runs.folder import RUN, RunFolder, Session, read_run
from jaxmed.runs.legal import Legal

ARRAYS = "scores"
LEGAL = Legal((ARRAYS,))
"""What a folder of scores may hold."""
CHUNK = 1 << 24
"""Numbers per stored chunk at most."""


class ScoreFolder:
    """Scores on disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: RunFolder | None = None

    @contextmanager
    def session(self, manifest: Mapping[str, Any], resume: bool) -> Iterator[Session]:
        """Begins or continues a run, and holds the folder inside the block.

        Raises:
            UserError: foreign files; a run without `resume`, or of another request; a disk without room; finished scores that are
                damaged (they are computed when the run is resumed again).
        """
        numbers = sum(int(np.prod(shape)) for shape in manifest["shapes"].values())
        needed = 4 * numbers * sum(not kind.endswith("inputs") for kind in manifest["kinds"])
        with RunFolder.open(self.folder, manifest, resume, LEGAL, needed) as run:
            self._open = run
            run.record.setdefault("passes", [])
            try:
                with run.session() as session:
                    self._mend(run)
                    yield session
                    run.record["kinds"] = list(manifest["kinds"])
            finally:
                self._open = None

    def spans(self) -> dict[str, Any]:
        """Set -> the passes of the run that the folder holds; nothing where it holds none."""
        found = read_run(self.folder).get("manifest", {}) if (self.folder / RUN).is_file() else {}
        spans = found.get("spans", {}) if isinstance(found, dict) else {}
        return spans if isinstance(spans, dict) else {}

    def _passes(self) -> list[list[Any]]:
        """Finished passes: set, first layer, layer after the last, mean loss, matrices, checksums of their scores by kind.

        Those of earlier versions have no checksums, or no matrices.
        """
        return (self._open.record if self._open else read_run(self.folder))["passes"]

    def has(self, which: str, span: tuple[int, int]) -> bool:
        """Whether a pass is finished."""
        return [which, *span] in [entry[:3] for entry in self._passes()]

    def losses(self) -> dict[str, float]:
        """Set -> mean loss, of the sets with a finished pass."""
        return {entry[0]: entry[3] for entry in self._passes()}

    def write(self, which: str, span: tuple[int, int], found: Mapping[str, Iterable[tuple[str, np.ndarray]]], loss: float) -> None:
        """Keeps what one pass gave, then notes that it is finished; inside `session`.

        Raises:
            UserError: the disk is full; finished passes stay.
        """
        names: dict[str, None] = {}
        wrong: dict[str, int] = {}
        sums: dict[str, dict[str, int]] = {}
        try:
            for kind, matrices in found.items():
                pending = []
                for name, array in matrices:
                    pending.append(self._create(f"{which}_{kind}", name, array.shape).write(array))
                    sums.setdefault(f"{which}_{kind}", {})[name] = sum_of(name, np.asarray(array, np.float32))
                    names[name] = None
                    wrong |= {f"{which}_{kind}": wrong.get(f"{which}_{kind}", 0) + 1} if not np.isfinite(array).all() else {}
                for one in pending:
                    one.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(
                f"Could not write to {self.folder}: {str(error).splitlines()[0][:300]}\nFinished passes are kept; continue with --resume."
            ) from None
        assert self._open is not None
        if wrong:
            shown = ", ".join(f"{count} matrices of {kind}" for kind, count in wrong.items())
            notice(
                f"{self.folder}: not finite in {shown}, which no mask can be made of. Look for NaN in the weights, or use --dtype float32."
            )
            self._open.record["not_finite"] = {**self._open.record.get("not_finite", {}), **wrong}
        self.__dict__.pop("_sums", None)
        self._open.note(passes=[*self._passes(), [which, *span, loss, list(names), sums]])

    def _mend(self, run: RunFolder) -> None:
        """Drops the finished passes of which something is damaged, so that they are run again."""
        kept, shown = [], []
        for entry in run.record["passes"]:
            damage = [
                f"{ARRAYS}/{kind}/{name}: {why}"
                for kind in run.manifest["kinds"]
                if kind.startswith(entry[0])
                for name in (entry[4] if len(entry) > 4 else ())
                for why in self._damage(kind, name)
            ]
            kept, shown = [*kept, *([] if damage else [entry])], [*shown, *damage]
        run.record["passes"] = kept
        self.__dict__.pop("_sums", None)
        run.tell_damage(shown)

    def _damage(self, kind: str, name: str) -> list[str]:
        try:
            self._read(kind, name)
        except (ValueError, OSError) as error:
            return [reason(error)]
        return []

    def finished(self) -> dict[str, Any]:
        """The manifest of a finished run; a UserError where there is none."""
        if not (self.folder / RUN).is_file():
            raise UserError(f"{self.folder} holds no scores. Give the --out folder of `jaxmed prune score`.")
        record = read_run(self.folder)
        if record.get("status") != "finished" or "passes" not in record:
            raise UserError(f"The scores in {self.folder} are not finished. Continue them with `jaxmed prune score ... --resume`.")
        return record["manifest"]

    def kinds(self) -> list[str]:
        """What was scored."""
        return (self._open.record if self._open else read_run(self.folder)).get("kinds", [])

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / ARRAYS / kind / name

    def _create(self, kind: str, name: str, shape: tuple[int, ...]) -> Any:
        rows = max(1, min(shape[0], CHUNK // max(1, int(np.prod(shape[1:])))))
        return open_array(self._path(kind, name), ArrayLayout(shape, (rows, *shape[1:])))

    def read(self, kind: str, name: str) -> np.ndarray:
        """One matrix's scores.

        Raises:
            UserError: they are missing or damaged.
        """
        try:
            return self._read(kind, name)
        except (ValueError, OSError) as error:
            fix = "Run `jaxmed prune score` again with --resume to compute them."
            raise UserError(f"{self.folder}: {ARRAYS}/{kind}/{name}: {reason(error)}. {fix}") from None

    def _read(self, kind: str, name: str) -> np.ndarray:
        """One matrix's scores; a ValueError or OSError where they are not what was written."""
        found = np.asarray(open_array(self._path(kind, name)).read().result())
        if self._sums.get((kind, name), sum_of(name, found)) != sum_of(name, found):
            raise ValueError(f"chunks: {MOVED}")
        return found

    @cached_property
    def _sums(self) -> dict[tuple[str, str], int]:
        """(kind, matrix) -> checksum, as the record says."""
        found = {}
        for entry in self._passes():
            for kind, held in (entry[5] if len(entry) > 5 else {}).items():
                found |= {(kind, name): said for name, said in held.items()}
        return found
