"""The command `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype
from jaxmed.models.catalog import DEFAULT


@dataclass(frozen=True)
class Convert:
    """Writes a model, with a LoRA adapter merged in if one is given, as a Hugging Face folder or as a sharded Orbax checkpoint."""

    to: Literal["huggingface", "orbax"]
    """huggingface: config, tokenizer and safetensors, which transformers loads. orbax: sharded, which --model restores under any mesh."""
    out: Path
    """Folder to write; must not exist yet, or be empty."""
    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    adapter: Path | None = None
    """LoRA adapter, as the folder that PEFT saves."""
    dtype: Dtype | None = None
    """Weights; default: the dtype that the checkpoint names, float32 where it names none or another."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    mesh: str = "data=1"
    """Device mesh to load onto, such as model=4 for a model larger than one device."""
    dry_run: bool = False
    """Print what would be written, and how many bytes, and stop."""
    config: Config = None

    def run(self) -> None:
        """Checks, says what will be written, and writes it."""
        from jaxmed.distributed import make_mesh
        from jaxmed.models.checkpoints.export import describe_export, export_folder
        from jaxmed.models.checkpoints.orbax_store import describe_store, save_store
        from jaxmed.models.load import describe, load

        tell, write = {"huggingface": (describe_export, export_folder), "orbax": (describe_store, save_store)}[self.to]
        asked = (self.model, self.dtype, self.revision, make_mesh(self.mesh))
        plan = tell(describe(*asked, adapter=self.adapter), self.out)
        show.lines(f"convert: {self.model}{f' + {self.adapter}' if self.adapter else ''}, to {self.to}", plan)
        if not self.dry_run:
            write(load(*asked, adapter=self.adapter), self.out)
            show.out.print(f"written: {self.out}", markup=False)
