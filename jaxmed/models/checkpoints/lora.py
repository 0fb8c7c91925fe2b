"""LoRA adapters of PEFT, merged into the tensors as they are read: W + scale * B @ A (Hu et al. 2021), scale = alpha / r.

Rank-stabilised adapters (Kalajdzievski 2023) have scale = alpha / sqrt(r). The sum is taken in float32, on the slice that is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmed.errors import UserError, all_problems, quoted
from jaxmed.files import check_sums
from jaxmed.models.checkpoints import Checkpoint
from jaxmed.models.checkpoints.edit_record import join_tags, read_edits, tags_of
from jaxmed.models.checkpoints.huggingface import READ, read_json, read_tensor_header
from jaxmed.models.checkpoints.lora_targets import Patterns, is_wrapped
from jaxmed.models.checkpoints.tensors import expected_tensors, is_stacked, needed_rules, under_full_names
from jaxmed.models.config import ModelConfig
from jaxmed.models.digests import known_digest
from jaxmed.models.families.table import Family

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TAG = "jaxmed_tag"
NEEDED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the model's own weights too
}
SWITCHES = ("use_rslora", "fan_in_fan_out")
KNOWN = frozenset(
    (
        "r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform layers_pattern "
        "fan_in_fan_out lora_dropout task_type base_model_name_or_path revision inference_mode auto_mapping peft_version megatron_core "
        "loftq_config eva_config corda_config lora_ga_config qalora_group_size " + TAG
    ).split()
)
"""Keys that are used here, or change nothing in a merge. Any other key must be empty. Which way a matrix lies (`fan_in_fan_out`)
follows from the family: PEFT itself overrides that key by the kind of layer it meets."""
TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_A|lora_B|base_layer)(?:\.default)?\.weight")
"""PEFT saves a copy of the matrix itself, `base_layer`, where it is the head; it takes the place of the model's."""
Shape = tuple[int, ...]
Matrices = Mapping[str, tuple[Shape, bool]]
"""Matrices of the model that an adapter may change: shape, and whether it is stored input by output."""


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one tensor: scale * B @ A, transposed where the tensor is stored input by output.

    Attributes:
        file, down, up: where A [r, inputs] and B [outputs, r] lie.
        base: where a copy of the tensor itself lies, if the adapter has one.
    """

    file: Path
    down: str
    up: str
    scale: float
    inputs_first: bool
    base: str | None = None

    def add(self, tensor: np.ndarray, cut: tuple[slice, ...] | None) -> np.ndarray:
        """A tensor, or a slice of it, with the delta added; float32."""
        cut = cut or (slice(None), slice(None))
        inputs, outputs = cut if self.inputs_first else cut[::-1]
        with safe_open(self.file, framework="numpy") as handle:
            down = handle.get_slice(self.down)[:, inputs].astype(np.float32)
            up = handle.get_slice(self.up)[outputs, :].astype(np.float32)
            tensor = tensor if self.base is None else handle.get_slice(self.base)[cut]
        product = np.float32(self.scale) * (up @ down)
        return tensor.astype(np.float32) + (product.T if self.inputs_first else product)


def with_adapter(checkpoint: Checkpoint, folder: Path, family: Family, config: ModelConfig) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint with a PEFT folder merged into what it reads, and the record of that edit.

    Raises:
        UserError: no adapter there, or anything in it that is not supported or does not fit the model (all problems together).
    """
    if checkpoint.restore is not None:
        raise UserError("An adapter is merged into a Hugging Face folder or a GGUF file; convert this checkpoint to huggingface first.")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"No {WEIGHTS} in {folder}. An adapter is a folder as PEFT saves it, with {SETTINGS}; pickled ones are not read.")
    settings = read_json(folder / SETTINGS)
    check_sums(folder, known_digest)
    deltas, problems = _deltas(folder / WEIGHTS, settings, _matrices(family, config), family)
    problems = _unsupported(settings) + problems
    if problems:
        raise all_problems(f"Adapter {folder}", problems, "Merge it with PEFT and load the merged model instead, or mend it.")
    checkpoint = under_full_names(checkpoint, family)

    def read(name: str, cut: tuple[slice, ...] | None = None) -> np.ndarray:
        tensor = checkpoint.read(name, cut)
        return deltas[name].add(tensor, cut) if name in deltas else tensor

    record = {"kind": "lora", "adapter": folder.resolve().name, "sha256": known_digest(folder / WEIGHTS), "matrices": len(deltas)}
    record |= {key: settings[key] for key in ("r", "lora_alpha", "use_rslora") if key in settings}
    tags = [*([settings[TAG]] if TAG in settings else []), *tags_of(read_edits(folder))]
    record |= {"tag": join_tags(tags)} if any(tags) else {}
    return replace(checkpoint, read=read, files=(*checkpoint.files, folder / SETTINGS, folder / WEIGHTS)), record


def _unsupported(settings: Mapping[str, Any]) -> list[str]:
    odd = [key for key in SWITCHES if not isinstance(settings.get(key), bool | None)]
    found = [f"{key} is {quoted(settings[key])}; true or false is expected" for key in odd]
    found += [
        f"{key} is {settings[key]!r}; merged are only adapters with {' or '.join(repr(value) for value in legal)}"
        for key, legal in NEEDED.items()
        if settings.get(key) is not None and settings[key] not in legal
    ]
    extra = sorted(key for key in settings if key not in KNOWN and key not in NEEDED and settings[key])
    return found + [f"{key} is {settings[key]!r}, which is not supported" for key in extra]


def _matrices(family: Family, config: ModelConfig) -> Matrices:
    rules = [rule for rule in needed_rules(family, config) if is_stacked(rule) or rule.path == ("head",)]
    return {
        name: (shape, family.inputs_first and is_stacked(rule))
        for rule in rules
        for name, shape in expected_tensors(rule, config)
        if len(shape) == 2
    }


def _deltas(file: Path, settings: Mapping[str, Any], matrices: Matrices, family: Family) -> tuple[dict[str, Delta], list[str]]:
    """The delta of every tensor that the adapter changes, and what is wrong with the adapter's tensors."""
    problems: list[str] = []
    modules: dict[str, dict[str, tuple[str, Shape]]] = {}
    for key, (shape, kind) in _headers(file).items():
        match = TENSOR.fullmatch(key)
        if kind not in READ:
            problems.append(f"tensor {key} is stored as {kind}; {', '.join(READ)} are read")
        elif match is None:
            problems.append(f"tensor {key} is no part of a LoRA matrix (embeddings, biases, magnitudes and saved modules are not merged)")
        else:
            modules.setdefault(match["module"], {})[match["part"]] = key, shape
    deltas: dict[str, Delta] = {}
    patterns = Patterns()
    for module, parts in modules.items():
        name = next((name for name in (module, family.begins + module) if name + ".weight" in matrices), module) + ".weight"
        if name not in matrices:
            problems.append(f"{module} is no matrix of this model")
        elif not _is_wrapped(module, settings, patterns, problems):
            continue  # PEFT makes no such module, and passes over its tensors
        elif missing := {"lora_A", "lora_B"} - parts.keys():
            problems.append(f"{module} has no {' and no '.join(sorted(missing))}")
        else:
            wrong = _misshapen(module, {part: shape for part, (_, shape) in parts.items()}, *matrices[name])
            scale = 0.0 if wrong else _scale(settings, module, parts["lora_A"][1][0], patterns, problems)
            problems += wrong
            base = parts.get("base_layer", (None,))[0]
            deltas[name] = Delta(file, parts["lora_A"][0], parts["lora_B"][0], scale, matrices[name][1], base)
    if not deltas and not problems:
        problems.append(f"none of its {len(modules)} modules is one that {SETTINGS} names (target_modules, layers_to_transform, ...)")
    return deltas, problems


def _is_wrapped(module: str, settings: Mapping[str, Any], patterns: Patterns, problems: list[str]) -> bool:
    try:
        return is_wrapped(module, settings, patterns)
    except ValueError as error:
        problems.append(f"{SETTINGS} does not say which modules are meant: {error}")
        return False


def _headers(file: Path) -> dict[str, tuple[Shape, str]]:
    try:
        return read_tensor_header(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {error} (truncated or damaged? {file.stat().st_size:,} bytes)") from None


def _misshapen(module: str, parts: Mapping[str, Shape], shape: Shape, inputs_first: bool) -> list[str]:
    outputs, inputs = shape[::-1] if inputs_first else shape
    down, up = parts["lora_A"], parts["lora_B"]
    rank = down[0] if down else 0
    if rank and (down, up) == ((rank, inputs), (outputs, rank)) and parts.get("base_layer", shape) == shape:
        return []
    return [f"{module} has A {list(down)} and B {list(up)}; the model's matrix has {outputs} outputs and {inputs} inputs"]


def _scale(settings: Mapping[str, Any], module: str, held: int, patterns: Patterns, problems: list[str]) -> float:
    try:
        rank = _number(_by_pattern(settings.get("rank_pattern"), module, settings["r"], patterns), int)
        alpha = _number(_by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"], patterns), int, float)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"{SETTINGS} gives no rank and alpha for {module}: {error}")
        return 0.0
    if rank != held:
        problems.append(f"{module} has rank {held}; {SETTINGS} says {rank}")
    return alpha / (math.sqrt(held) if settings.get("use_rslora") else held)


def _number(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds or not math.isfinite(value):
        raise ValueError(f"{quoted(value)} is no number of that kind")
    return value


def _by_pattern(values: Mapping[str, Any] | None, module: str, default: Any, patterns: Patterns) -> Any:
    """The value of the first pattern that the end of the module's name matches, as PEFT finds it."""
    return next((value for key, value in (values or {}).items() if patterns.match(rf"(.*\.)?({key})$", module)), default)
