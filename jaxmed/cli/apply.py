"""The command `prune apply`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxmed.cli import show
from jaxmed.cli.flags import NewFolderFlag, OneDeviceFlag, PlanFlags, SourceFlags
from jaxmed.cli.mask import describe_mask


@dataclass(frozen=True, kw_only=True)
class Apply(NewFolderFlag, OneDeviceFlag, SourceFlags, PlanFlags):
    """Writes a model with the weights of a mask set to zero, to their mean, or scaled."""

    mask: Path
    """Mask file whose weights are edited."""
    to: Literal["zero", "mean", "scale"] = "zero"
    """Masked weights become zero, the mean of the masked weights of their matrix, or are multiplied by --factor."""
    factor: float = 0.0
    """Number that masked weights are multiplied by, with --to scale."""
    any_model: bool = False
    """Take a mask that was made of other weights of the same shapes, such as an aligned sibling's."""
    format: Literal["huggingface", "orbax"] = "huggingface"
    """A folder that transformers loads, or a sharded checkpoint of our own."""

    def run(self) -> None:
        """Loads, edits, writes."""
        from jaxmed.models.checkpoints.export import check_writable, export_folder
        from jaxmed.models.checkpoints.new_folder import check_vacant
        from jaxmed.models.checkpoints.orbax_store import save_store
        from jaxmed.pruning import apply_mask, read_mask
        from jaxmed.pruning.apply import check_mask

        check_vacant(self.out, 0)
        mask = read_mask(self.mask)
        model = self.describe()
        check_writable(model)
        check_mask(model, mask, self.any_model, written=True)
        show.lines(f"prune apply: {self.mask} to {self.model}", describe_mask(mask))
        if not self.dry_run:
            edited = apply_mask(self.load(), mask, self.to, self.factor, self.any_model)
            {"huggingface": export_folder, "orbax": save_store}[self.format](edited, self.out)
            show.out.print(f"written: {self.out}", markup=False)
