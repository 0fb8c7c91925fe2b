"""A folder of scores: run.json, and one TensorStore array per kind and matrix; finished passes alone count."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxmed import results
from jaxmed.errors import UserError
from jaxmed.runs.provenance import versions

ARRAYS = "scores"
_OURS = {results.RUN, results.RUN + ".tmp", ARRAYS}
CHUNK = 1 << 24
"""Numbers per stored chunk at most."""


def check_folder(folder: Path, resume: bool) -> bool:
    """Whether scoring can begin or go on in `folder`; returns True if it holds a run to go on with.

    Raises:
        UserError: foreign files, or a run and no --resume.
    """
    return results.RUN in results.check_contents(folder, resume, _OURS)


class ScoreFolder:
    """Scores on disk."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, manifest: Mapping[str, Any], resume: bool) -> None:
        """Begins or continues a run.

        Raises:
            UserError: foreign files; a run without `resume`, or of another request; a disk without room.
        """
        if check_folder(self.folder, resume):
            results.check_same(self.folder, results.read_run(self.folder)["manifest"], manifest)
            return
        numbers = sum(int(np.prod(shape)) for shape in manifest["shapes"].values())
        results.check_space(self.folder, 4 * numbers * sum(not kind.endswith("inputs") for kind in manifest["kinds"]))
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._note({"manifest": dict(manifest), "started": begun, "versions": versions(), "status": "running", "passes": []})

    def _note(self, record: Mapping[str, Any]) -> None:
        results.write_json(self.folder / results.RUN, record)

    def has(self, which: str, span: tuple[int, int]) -> bool:
        """Whether a pass is finished."""
        return [which, *span] in [entry[:3] for entry in results.read_run(self.folder)["passes"]]

    def losses(self) -> dict[str, float]:
        """Set -> mean loss, of the sets with a finished pass."""
        return {which: loss for which, _, _, loss in results.read_run(self.folder)["passes"]}

    def write(self, which: str, span: tuple[int, int], found: Mapping[str, Iterable[tuple[str, np.ndarray]]], loss: float) -> None:
        """Keeps what one pass gave, then notes that it is finished.

        Raises:
            UserError: the disk is full; finished passes stay.
        """
        try:
            for kind, matrices in found.items():
                pending = [self._array(f"{which}_{kind}", name, array.shape).write(array) for name, array in matrices]
                for one in pending:
                    one.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(
                f"Could not write to {self.folder}: {str(error).splitlines()[0][:300]}\nFinished passes are kept; continue with --resume."
            ) from None
        record = results.read_run(self.folder)
        self._note({**record, "passes": [*record["passes"], [which, *span, loss]]})

    def close(self, kinds: Iterable[str]) -> None:
        """Notes that all passes are finished."""
        self._note({**results.read_run(self.folder), "status": "finished", "kinds": list(kinds)})

    def finished(self) -> dict[str, Any]:
        """The manifest of a finished run; a UserError where there is none."""
        if not (self.folder / results.RUN).is_file():
            raise UserError(f"{self.folder} holds no scores. Give the --out folder of `jaxmed prune score`.")
        record = results.read_run(self.folder)
        if record.get("status") != "finished" or "passes" not in record:
            raise UserError(f"The scores in {self.folder} are not finished. Continue them with `jaxmed prune score ... --resume`.")
        return record["manifest"]

    def kinds(self) -> list[str]:
        """What was scored."""
        return results.read_run(self.folder).get("kinds", [])

    def _array(self, kind: str, name: str, shape: tuple[int, ...] | None = None) -> Any:
        spec: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str((self.folder / ARRAYS / kind / name).resolve()) + "/"},
        }
        if shape is None:
            return ts.open(spec, open=True).result()
        rows = max(1, min(shape[0], CHUNK // max(1, int(np.prod(shape[1:])))))
        grid = {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}}
        spec |= {"metadata": {"shape": list(shape), "data_type": "float32", "chunk_grid": grid}}
        return ts.open(spec, create=True, delete_existing=True).result()

    def read(self, kind: str, name: str) -> np.ndarray:
        """One matrix's scores."""
        try:
            return np.asarray(self._array(kind, name).read().result())
        except (ValueError, OSError) as error:
            raise UserError(f"{self.folder}: the {kind} scores of {name} cannot be read: {str(error).splitlines()[0][:200]}") from None
