"""Low-rank adapters (Hu et al. 2021) while they are trained, and as PEFT keeps them.

Every matrix of the checkpoint that is adapted has factors A [r, inputs] and B [outputs, r], stacked over layers; W + scale * B @ A
takes its place, scale = alpha / r, or alpha / sqrt(r) where rank-stabilised (Kalajdzievski 2023). `lay_out` turns them into
what a block adds to its own, fused matrices; W itself is never copied and has no gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxmed.errors import UserError, unknown
from jaxmed.files import write_sums
from jaxmed.finetuning.settings import Lora
from jaxmed.models.checkpoints.edit_record import join_tags, refuse_attacks, tags_of, write_record
from jaxmed.models.checkpoints.lora import SETTINGS, TAG, WEIGHTS
from jaxmed.models.checkpoints.new_folder import new_folder
from jaxmed.models.checkpoints.tensors import matrix_rules
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import FAMILIES
from jaxmed.models.families.table import Family, Rule
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.models.transformer import ADDED, blocks_from

MOST_RANK = 2**16
Factors = dict[str, dict[str, Any]]
"""Module name with `{l}` for the layer -> {"A": float32 [L, r, inputs], "B": float32 [L, outputs, r]}, L from the first adapted one on."""


def adapted_rules(config: ModelConfig, lora: Lora) -> list[tuple[Rule, list[str | None]]]:
    """The rules of the blocks' matrices, with the module name of every source that is adapted (None: it is not).

    Raises:
        UserError: a mixture of experts; a rank below one; a first layer or a target that the model does not have.
    """
    if config.experts:
        raise UserError("A mixture of experts is fine-tuned in full only (--method full): its experts' matrices have no adapters here.")
    if lora.rank < 1 or not lora.alpha > 0:
        raise UserError(f"An adapter has a rank of at least 1 and an alpha above 0, not {lora.rank} and {lora.alpha}.")
    if lora.rank > MOST_RANK:
        raise UserError(f"A rank of {lora.rank:,} is more than any matrix has; give at most {MOST_RANK:,}.")
    if not 0 <= lora.first_layer < config.layers:
        raise UserError(f"first_layer is {lora.first_layer}; this model has the layers 0 to {config.layers - 1}.")
    rules = matrix_rules(FAMILIES[config.family])
    names = {rule.path: [source.name.removesuffix(".weight") for source in rule.sources] for rule in rules}
    legal = sorted({name.split(".")[-1] for held in names.values() for name in held})
    for target in lora.targets:
        if target not in legal:
            raise unknown("adapter target", target, legal)
    wanted = lambda name: not lora.targets or name.split(".")[-1] in lora.targets  # noqa: E731
    found = [(rule, [name if wanted(name) else None for name in names[rule.path]]) for rule in rules]
    return [(rule, held) for rule, held in found if any(held)]


def _size(config: ModelConfig, letters: str) -> int:
    return sum(math.prod(config.sizes[letter] for letter in part) for part in letters.split("+"))


def _sides(family: Family, config: ModelConfig, rule: Rule, number: int) -> tuple[int, int]:
    """Outputs and inputs of a source."""
    first, second = (_size(config, letters) for letters in rule.sources[number].shape)
    return (second, first) if family.inputs_first else (first, second)


def factor_shapes(config: ModelConfig, lora: Lora) -> Factors:
    """`jax.ShapeDtypeStruct` of every factor."""
    family, factors, layers = FAMILIES[config.family], {}, config.layers - lora.first_layer
    for rule, names in adapted_rules(config, lora):
        for number, name in enumerate(names):
            if name is not None:
                outputs, inputs = _sides(family, config, rule, number)
                shapes = {"A": (layers, lora.rank, inputs), "B": (layers, outputs, lora.rank)}
                factors[name] = {side: jax.ShapeDtypeStruct(shape, np.float32) for side, shape in shapes.items()}
    return factors


def new_factors(config: ModelConfig, lora: Lora, seed: int) -> Factors:
    """Fresh factors: A uniform in +-1/sqrt(inputs), as PEFT draws it, and B zero, so that nothing is changed yet."""
    rng = np.random.default_rng(seed)

    def draw(shapes: dict[str, Any]) -> dict[str, Any]:
        drawn = rng.uniform(-1, 1, shapes["A"].shape) / math.sqrt(shapes["A"].shape[-1])
        return {"A": drawn.astype(np.float32), "B": np.zeros(shapes["B"].shape, np.float32)}

    return {name: draw(shapes) for name, shapes in factor_shapes(config, lora).items()}


def lay_out(config: ModelConfig, lora: Lora, factors: Factors) -> Params:
    """Factors as the blocks add them: matrix -> ([L, ...in, R], [L, R, ...out]), the scale in the second."""
    family = FAMILIES[config.family]
    added = {}
    for rule, names in adapted_rules(config, lora):
        of_rule = {str(number): factors[name] for number, name in enumerate(names) if name is not None}
        name = rule.path[-1]
        lay = _outputs_joined if name in ("qkv", "gate_up") else _inputs_joined
        added[name] = jax.vmap(lambda held, lay=lay, rule=rule: lay(family, config, rule, held, lora.scale))(of_rule)
    return added


def _outputs_joined(family: Family, config: ModelConfig, rule: Rule, factors: Mapping[str, Any], scale: float) -> tuple[Any, Any]:
    """Matrices whose outputs lie side by side: each has its own columns of the first factor, and its own outputs of the second."""
    down = jnp.concatenate([held["A"] for held in factors.values()]).T
    total, begin, parts = down.shape[-1], 0, []
    for number in range(len(rule.sources)):
        outputs = _sides(family, config, rule, number)[0]
        up = jnp.zeros((outputs, total))
        if str(number) in factors:
            own = factors[str(number)]["B"] * scale
            up = jax.lax.dynamic_update_slice(up, own, (0, begin))
            begin += own.shape[-1]
        parts.append(up.T if family.inputs_first else up)
    return down, rule.layout.join({**config.sizes, "D": total}, *parts)


def _inputs_joined(family: Family, config: ModelConfig, rule: Rule, factors: Mapping[str, Any], scale: float) -> tuple[Any, Any]:
    """A matrix that is one tensor: `out` and `down`, whose inputs are heads or neurons."""
    down, up = factors["0"]["A"], factors["0"]["B"]
    down = rule.layout.join({**config.sizes, "D": down.shape[0]}, down.T if family.inputs_first else down)
    return down, up.T * scale


def with_factors(params: Params, added: Params) -> Params:
    """Parameters whose blocks add low-rank products to their matrices."""
    return {**params, "blocks": {**params["blocks"], ADDED: added}}


def merge(config: ModelConfig, params: Params, added: Params) -> Params:
    """Parameters with the products added to the matrices of the highest layers in float32, one layer at a time."""

    def one(blocks: Params) -> Params:
        merged = {}
        for name, (down, up) in blocks[ADDED].items():
            delta = jnp.tensordot(down, up, 1, precision="highest")
            merged[name] = (blocks[name].astype(jnp.float32) + delta).astype(blocks[name].dtype)
        return merged

    if config.int8:
        raise UserError("A model kept as int8 takes no adapter into its weights: load it without int8, then merge.")
    first = config.layers - jax.tree.leaves(added)[0].shape[0]

    def above(matrices: Params, added: Params) -> Params:
        merged = jax.lax.map(one, {**blocks_from(matrices, first), ADDED: added})
        return {name: jnp.concatenate([matrix[:first], merged[name]]) for name, matrix in matrices.items()} if first else merged

    changed = jax.jit(above)({name: params["blocks"][name] for name in added}, added)
    return {**params, "blocks": {**params["blocks"], **changed}}


def save_adapter(model: Model, factors: Factors, lora: Lora, folder: str | Path, tag: str = "") -> Path:
    """Writes factors as a folder that PEFT and `load(adapter=...)` read, with the record of the edits of the model it was trained on.

    Args:
        tag: what the adapter is for, one of `edit_record.TAGS`; a stricter tag of the model's edits goes before it.

    Raises:
        UserError: a tag "attack", the adapter's or that of an edit of the model; a folder that holds something; a full disk.
    """
    edits = [*model.history, *([{"tag": tag}] if tag else [])]
    refuse_attacks(edits)
    folder, family = Path(folder), FAMILIES[model.config.family]
    tensors = {
        f"base_model.model.{name.format(l=lora.first_layer + at)}.lora_{part}.weight": np.ascontiguousarray(matrix)
        for name, parts in factors.items()
        for part, stack in parts.items()
        for at, matrix in enumerate(np.asarray(stack))
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.name),
        "revision": model.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.stabilised,
        "target_modules": sorted({name.split(".")[-1] for name in factors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family.inputs_first,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    settings |= {"layers_to_transform": list(range(lora.first_layer, model.config.layers))} if lora.first_layer else {}
    settings |= {TAG: joined} if (joined := join_tags(tags_of(edits))) else {}
    with new_folder(folder, sum(array.nbytes for array in tensors.values())) as scratch:
        save_file(tensors, scratch / WEIGHTS)
        write_sums(scratch, [scratch / WEIGHTS])
        (scratch / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if model.history:
            write_record(scratch, {"name": str(model.name), "revision": model.revision}, model.history)
    return folder
