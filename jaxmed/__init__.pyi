from . import circuits, probing, pruning, statistics, tokens
from .answering.run import answers
from .bridge.enrichment import Enriched, enrichment
from .cache.table import activations, mean_difference
from .circuits.run import circuit
from .distributed import make_mesh
from .effects.patch import Patched, patch
from .effects.sweep import sweep
from .effects.trace import trace
from .errors import UserError
from .finetuning.run import finetune
from .gating.run import Gated, gate
from .generation import Following, generate
from .ground_truth.plant import planted
from .interventions import edits
from .interventions.edit import Edit
from .loading import load
from .memory import keep_freed_memory
from .models.checkpoints.export import export_folder
from .models.model import Model
from .parity.selfcheck import self_check
from .probing.api import probe
from .prompts import Example, PromptPair, read_examples, read_pairs
from .results import open_results
from .runner.public import forward

__all__ = [
    "Edit",
    "Enriched",
    "Example",
    "Following",
    "Gated",
    "Model",
    "Patched",
    "PromptPair",
    "UserError",
    "activations",
    "answers",
    "circuit",
    "circuits",
    "edits",
    "enrichment",
    "export_folder",
    "finetune",
    "forward",
    "gate",
    "generate",
    "keep_freed_memory",
    "load",
    "make_mesh",
    "mean_difference",
    "open_results",
    "patch",
    "planted",
    "probe",
    "probing",
    "pruning",
    "read_examples",
    "read_pairs",
    "self_check",
    "statistics",
    "sweep",
    "tokens",
    "trace",
]
__version__: str
