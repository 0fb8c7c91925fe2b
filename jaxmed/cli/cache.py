"""The commands `cache write`, `cache info` and `cache verify`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags, FormFlag, HostsFlags, LimitFlag, LogFlag, ModelFlags, RunFlags
from jaxmed.cli.resumed import check_resumed
from jaxmed.errors import UserError, all_problems


@dataclass(frozen=True, kw_only=True)
class CacheWrite(LimitFlag, FormFlag, ModelFlags, HostsFlags, RunFlags):
    """Writes activations of many prompts to a folder: a Zarr group with an array per site, which `xarray.open_zarr` opens."""

    data: str = ""
    """Prompts (.jsonl, .csv, .parquet; column prompt, optional id), or a bundled set such as ordinary."""
    sites: tuple[str, ...] = ("residual_out",)
    """Sites that are kept, one or several, such as residual_out neuron head_out."""
    positions: tuple[str, ...] = ("last",)
    """Tokens that are kept: last, user_last, user, header, all, or a word of the prompts; or numbers from the right, such as -3 -1."""
    out: Path = Path("jaxmed-cache")
    """Folder that becomes the Zarr group."""

    def run(self) -> None:
        """Checks, plans, runs, writes."""
        from jaxmed.cache.job import make_job
        from jaxmed.cache.store import LEGAL, cache_manifest
        from jaxmed.cache.table import write_activations
        from jaxmed.hosts import first_tells
        from jaxmed.prompts.examples import read_examples
        from jaxmed.runs.legal import check_folder

        self.join()
        first_tells(lambda: check_folder(self.out, self.resume, LEGAL))
        if not self.data:
            raise UserError("Give --data FILE: prompts whose activations are kept (column prompt).")
        prompts = self.first(read_examples(self.data, responses=False))
        job = make_job(self.describe(), prompts, self.sites, _positions(self.positions), self.form)
        first_tells(lambda: check_resumed(self, LEGAL, (job.model,), lambda: cache_manifest(job.manifest)) or 0.0)
        self._plan(job)
        if self.dry_run:
            return
        job = replace(job, model=self.load())
        with show.progress("activations", float(sum(map(len, job.rows))), "prompts") as report:
            write_activations(job, self.out, self.resume, report)
        show.lines("written", [f"{self.out}: jaxmed cache info {self.out}, or xarray.open_zarr({str(self.out)!r}, consolidated=False)"])

    def _mesh(self) -> Any:
        """Each process computes shards of its own, on its own devices."""
        from jaxmed.hosts import own_mesh

        return own_mesh(self.mesh)

    def _plan(self, job: Any) -> None:
        from jaxmed.runs.cost import matmul_rate, show_bytes

        rate = matmul_rate(job.model.config, job.model.mesh, 512)
        lines = [f"{len(job.rows):,} prompts of {min(map(len, job.rows))} to {max(map(len, job.rows))} tokens; positions: {job.asked}"]
        lines += [f"{name} {_shape(layout.shape, layout.dims)}" for name, layout in job.table.arrays.items()]
        lines += [
            job.cost(self._done(job)).line(rate),
            f"{job.shard:,} prompts are written together: {show_bytes(job.table.bytes * job.shard / len(job.rows))}",
        ]
        show.lines(f"cache write: {job.model.name}", lines)

    def _done(self, job: Any) -> np.ndarray | None:
        """bool [prompt], what --out holds already of a run that goes on; None of a new one."""
        from jaxmed.cache.folders import read_held
        from jaxmed.cache.store import MANIFEST

        found = read_held(self.out).done if self.resume and (self.out / MANIFEST).is_file() else None
        return found if found is not None and found.shape == (len(job.rows),) else None


def _positions(given: tuple[str, ...]) -> str | list[int]:
    """Positions as Python takes them."""
    if len(given) == 1 and not given[0].removeprefix("-").isdecimal():
        return given[0]
    wrong = [text for text in given if not text.removeprefix("-").isdecimal()]
    if wrong or not given:
        raise UserError(f"--positions {' '.join(given)}: give one word, such as last, or numbers from the right, such as -3 -1.")
    return [int(text) for text in given]


def _shape(shape: tuple[int, ...], dims: tuple[str, ...]) -> str:
    return "[" + ", ".join(f"{dim} {size:,}" for dim, size in zip(dims, shape, strict=True)) + "]"


@dataclass(frozen=True, kw_only=True)
class FolderFlag(ConfigFlags):
    """A folder of activations."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("jaxmed-cache")
    """Folder that `jaxmed cache write` wrote."""


@dataclass(frozen=True, kw_only=True)
class CacheInfo(FolderFlag):
    """Says what a folder of activations is of, how far it is, and how large; reads no activations."""

    def run(self) -> None:
        """Reads the manifest, prints."""
        from jaxmed.cache.folders import read_held
        from jaxmed.runs.cost import show_bytes

        held = read_held(self.folder)
        model, prompts = held.manifest.get("model", {}), len(held.done)
        lines = [
            f"model {model.get('name', 'unknown')}, weights {str(model.get('weights', 'unknown'))[:16]}",
            f"{int(held.done.sum()):,} of {prompts:,} prompts are done; the run is {held.status or 'unknown'}",
            f"form {held.manifest.get('form')}; positions {held.manifest.get('positions')}",
            f"{held.shard:,} prompts are written together; a layer is read alone",
        ]
        show.lines(f"cache: {self.folder}", lines)
        rows = [[name, " x ".join(map(str, shape)), show_bytes(size)] for name, (shape, size) in held.arrays.items()]
        show.table("arrays", ["site", "prompt x layer x position x unit", "bytes"], rows, left=2)


@dataclass(frozen=True, kw_only=True)
class CacheVerify(LogFlag, FolderFlag):
    """Reads a folder of activations whole and compares its checksums; exit code 2 where something is damaged or missing."""

    def run(self) -> None:
        """Reads everything, prints."""
        from jaxmed.cache.folders import read_held, verify

        held = read_held(self.folder)
        with show.progress("verify", float(held.done.sum() * len(held.arrays)), "prompts") as report:
            damage = verify(held, report)
        left = int((~held.done).sum())
        damage += [f"{left:,} of {len(held.done):,} prompts are not written yet"] * bool(left)
        if damage:
            raise all_problems(f"{self.folder} is not whole", damage, "`jaxmed cache write --resume` with the same request mends it.")
        show.lines(f"cache: {self.folder}", [f"all {len(held.done):,} prompts of {len(held.arrays)} sites are whole"])
