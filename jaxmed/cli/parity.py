"""The command `parity`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags, ModelFlags, check_absent
from jaxmed.errors import UserError
from jaxmed.models.catalog import locate

TOLERANCES = {"float32": 2e-4, "bfloat16": 0.1}
"""Largest difference that still counts as parity, relative to a site's largest value where that exceeds one."""


@dataclass(frozen=True, kw_only=True)
class Parity(ModelFlags, ConfigFlags):
    """Compares a model's logits and every named site, layer by layer, with transformers or with a stored reference file.

    Exit code 1 where they part.
    """

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

    def run(self) -> int:
        """Runs both sides and shows where they differ; 1 where they part."""
        from jaxmed.parity.compare import compare, first_parting, read_reference

        check_absent(self.write, "--write")
        if self.tokens < 0:
            raise UserError(f"--tokens {self.tokens} is negative. Give 0 for the bundled prompt, or how many random token ids.")
        stored = None if self.reference == "transformers" else read_reference(Path(self.reference))
        if self.int8 and stored is None:
            raise UserError(
                "Weights kept as int8 are rounded, and transformers would run others. Leave out --int8, or give --reference FILE."
            )
        self.describe()
        model = self.load()
        reference = stored or self._ask_transformers(model)
        differences = compare(model, reference)
        tolerance = TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance
        _show(differences, tolerance)
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

        # what was edited after the files were read is not in them: transformers gets the weights that are in memory
        path = None if self.adapter or self.mask else locate(self.model, self.revision)
        with tempfile.TemporaryDirectory() as scratch:
            file = self.write or Path(scratch) / "reference.safetensors"
            make_reference(model, path if path and (path / "config.json").is_file() else None, sample_tokens(model, self.tokens), file)
            return read_reference(file)


def _show(differences: list[Any], tolerance: float) -> None:
    """Prints the largest differences, layer by site; those beyond the tolerance are marked."""
    sites = list(dict.fromkeys(d.site for d in differences if d.layer >= 0))
    cells: dict[int, list[str]] = {}
    for d in differences[:-1]:
        cells.setdefault(d.layer, []).append(f"{d.largest:.0e}{'!' if d.parts(tolerance) else ''}")
    mean = [sum(d.mean for d in differences if d.site == name) / len(cells) for name in sites]
    rows = [[str(layer), *row] for layer, row in cells.items()]
    show.table("largest absolute difference", ("layer", *sites), [*rows, ["mean", *(f"{value:.0e}" for value in mean)]])


def _write(file: Path, differences: list[Any]) -> None:
    from jaxmed.files import write_csv
    from jaxmed.parity.compare import rows

    write_csv(file, rows(differences))
