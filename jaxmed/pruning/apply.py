"""A model with the weights of a mask edited, in memory; writing it out is `export_folder`'s and `save_store`'s."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.models.checkpoints.edit_record import refuse_attacks
from jaxmed.models.model import Model
from jaxmed.models.named_weights import matrix_shapes, with_edited
from jaxmed.pruning.masks import Mask

TO = ("zero", "mean", "scale")


def apply_mask(model: Model, mask: Mask, to: str = "zero", factor: float = 0.0, any_model: bool = False) -> Model:
    """The model with the masked weights set to zero, to their mean within each matrix, or multiplied by `factor` ("scale").

    Every other number keeps its bits. The edit is recorded in `model.history`; a mask tagged "attack" makes a model that is not written.

    Args:
        any_model: take a mask that was made of other weights of the same shapes, such as those of an aligned sibling.

    Raises:
        UserError: a mask of other matrices, or of other weights; another word; a model kept as int8.
    """
    if to not in TO:
        raise unknown("edit", to, TO)
    check_mask(model, mask, any_model)
    params = with_edited(model.config, model.params, mask.indices, partial(_edited, to=to, factor=factor))
    return replace(model, params=params, history=(*model.history, mask_edit(mask, to, factor))).describe_params()


def mask_edit(mask: Mask, to: str = "zero", factor: float = 0.0) -> dict[str, Any]:
    """The record of a mask that is applied."""
    edit = {"kind": "pruning", "to": to, "weights": mask.count, "fraction": mask.count / mask.size, "mask_of": mask.model}
    edit |= {"sha256": mask.digest, "rule": dict(mask.rule)} | ({"factor": factor} if to == "scale" else {})
    return edit | ({"tag": mask.tag} if mask.tag else {})


def check_mask(model: Model, mask: Mask, any_model: bool = False, written: bool = False) -> None:
    """Raises a UserError where a mask cannot be applied to a model; needs no parameters.

    Args:
        written: whether the edited model is to be written, which a mask tagged "attack" forbids.
    """
    if model.config.int8:
        raise UserError("A model kept as int8 is not pruned: its weights are rounded. Load it without int8.")
    shapes = matrix_shapes(model.config)
    if dict(mask.shapes) != shapes:
        wrong = next((name for name, shape in mask.shapes.items() if shapes.get(name) != shape), "some matrices are missing")
        raise UserError(f"The mask is of another model: it was made of {mask.model!r}, and {model.name!r} differs ({wrong}).")
    if mask.weights != model.identity and not any_model:
        raise UserError(
            f"The mask was made of other weights ({mask.model!r}, identity {mask.weights[:12]}) than {model.name!r} has "
            f"({model.identity[:12]}). Use that model, or say that any model of these shapes will do (--any-model)."
        )
    if written:
        refuse_attacks([*model.history, {"tag": mask.tag}])


def _edited(values: np.ndarray, to: str, factor: float) -> np.ndarray:
    wide = values.astype(np.float32)
    found = {"zero": np.zeros_like(wide), "mean": np.full_like(wide, wide.mean()), "scale": wide * factor}[to]
    return found.astype(values.dtype)
