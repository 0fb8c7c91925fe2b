"""The command `parity`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype, load_model
from jaxmed.errors import UserError
from jaxmed.models.catalog import DEFAULT, locate

TOLERANCES = {"float32": 2e-4, "bfloat16": 0.1}
"""Largest difference that still counts as parity, relative to a site's largest value where that exceeds one."""


@dataclass(frozen=True)
class Parity:
    """Compares a model's logits and every named site, layer by layer, with transformers or with a stored reference file.

    Exit code 1 where they part.
    """

    model: str = DEFAULT
    """Known name, local folder, .gguf file, or Hugging Face name."""
    reference: str = "transformers"
    """"transformers" (needs PyTorch), or a reference file that --write has made."""
    write: Path | None = None
    """Keep the reference in this file, for machines without PyTorch."""
    tokens: int = 0
    """Compare on so many random token ids; 0: on a bundled prompt (random ids where the model has no tokenizer)."""
    tolerance: float | None = None
    """Largest difference allowed, relative to a site's largest value where that exceeds one; default 2e-4 (bfloat16: 0.1)."""
    out: Path | None = None
    """Write the largest and mean difference of every layer and site to this csv file."""
    dtype: Dtype = "float32"
    """Weights and matmuls, of both sides."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    mesh: str | None = None
    """Device mesh, such as data=1,model=2."""
    config: Config = None

    def run(self) -> int:
        """Runs both sides and shows where they differ; 1 where they part."""
        from jaxmed.parity.compare import compare, first_parting, read_reference

        if self.write is not None and self.write.exists():
            raise UserError(f"{self.write} exists already; give --write another name, or --reference {self.write} to compare with it.")
        stored = None if self.reference == "transformers" else read_reference(Path(self.reference))
        model = load_model(self.model, self.dtype, self.revision, self.mesh)
        reference = stored or self._ask_transformers(model)
        differences = compare(model, reference)
        tolerance = TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance
        show.out.print(_table(differences, tolerance))
        if self.out is not None:
            _write(self.out, differences)
        parting, logits = first_parting(differences, tolerance), differences[-1]
        show.lines(
            f"{model.name}, {self.dtype}, {len(reference.tokens)} tokens, against {reference.made_by} ({reference.dtype})",
            [
                f"logits: largest difference {logits.largest:.2g}, mean {logits.mean:.2g}",
                "self-check passed; no site parts from the reference"
                if parting is None
                else f"first place where they part: layer {parting.layer}, {parting.site} (largest difference {parting.largest:.2g})",
            ],
        )
        return int(parting is not None)

    def _ask_transformers(self, model: Any) -> Any:
        from jaxmed.parity.compare import make_reference, read_reference, sample_tokens

        path = locate(self.model, self.revision)
        with tempfile.TemporaryDirectory() as scratch:
            file = self.write or Path(scratch) / "reference.safetensors"
            make_reference(model, path if (path / "config.json").is_file() else None, sample_tokens(model, self.tokens), file)
            return read_reference(file)


def _table(differences: list[Any], tolerance: float) -> Table:
    """Largest differences, layer by site; those beyond the tolerance are marked."""
    sites = list(dict.fromkeys(d.site for d in differences if d.layer >= 0))
    table = Table(title="largest absolute difference", title_justify="left")
    for name in ("layer", *sites):
        table.add_column(name.replace("_", "_\u200b"), justify="right")
    cells: dict[int, list[str]] = {}
    for d in differences[:-1]:
        mark = "!" if d.parts(tolerance) else ""
        cells.setdefault(d.layer, []).append(f"{d.largest:.0e}{mark}")
    for layer, row in cells.items():
        table.add_row(str(layer), *row)
    mean = [sum(d.mean for d in differences if d.site == name) / len(cells) for name in sites]
    table.add_section()
    table.add_row("mean", *(f"{value:.0e}" for value in mean))
    return table


def _write(file: Path, differences: list[Any]) -> None:
    from jaxmed.files import write_csv
    from jaxmed.parity.compare import rows

    write_csv(file, rows(differences))
