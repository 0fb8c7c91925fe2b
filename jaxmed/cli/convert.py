"""The command `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmed.cli import show
from jaxmed.cli.flags import Dtype, ModelFlags, NewFolderFlag, OneDeviceFlag, PlanFlags


@dataclass(frozen=True, kw_only=True)
class Convert(NewFolderFlag, OneDeviceFlag, ModelFlags, PlanFlags):
    """Writes a model, with adapter and mask applied where they are given, as a Hugging Face folder or as a sharded Orbax checkpoint."""

    to: Literal["huggingface", "orbax"]
    """Format. huggingface: config, tokenizer and safetensors for transformers; orbax: sharded, restored under any mesh by --model."""
    dtype: Dtype | None = None
    """Number format of the written weights; default: the one that the checkpoint names, float32 where it names none or another."""

    def run(self) -> None:
        """Checks, says what will be written, and writes it."""
        from jaxmed.models.checkpoints.export import describe_export, export_folder
        from jaxmed.models.checkpoints.orbax_store import describe_store, save_store

        tell, write = {"huggingface": (describe_export, export_folder), "orbax": (describe_store, save_store)}[self.to]
        plan = tell(self.describe(), self.out)
        show.lines(f"convert: {self.model}{f' + {self.adapter}' if self.adapter else ''}, to {self.to}", plan)
        if not self.dry_run:
            write(self.load(), self.out)
            show.out.print(f"written: {self.out}", markup=False)
