"""Masks: which weights of which matrices, as a file that any program reads, with set operations and overlaps.

The file is safetensors: one int64 vector of flat indices per matrix (possibly empty), named and laid out as in the Hugging Face
checkpoint; its metadata say of which model, with which shapes, and by which rule.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmed.errors import UserError, all_problems, quoted, unknown
from jaxmed.files import atomic, check_file, parse_json
from jaxmed.models.checkpoints.edit_record import join_tags, read_tag
from jaxmed.models.checkpoints.safetensors_file import tensor, write_file

FORMAT = "jaxmed-mask-1"
HOW = ("intersect", "union", "subtract")


class Made(Mapping[str, np.ndarray]):
    """Indices that are made anew whenever a matrix is asked for, so that no more than one matrix's are in memory."""

    def __init__(self, names: Iterable[str], make: Callable[[str], np.ndarray]):
        self.names, self.make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Mask:
    """Chosen weights.

    Attributes:
        indices: matrix -> int64, ascending flat indices; every scored matrix has an entry.
        shapes: matrix -> its shape in the checkpoint.
        model, weights: name and weights hash of the model it was made of.
        rule: how it was made, JSON values.
        tag: what it is for, one of `edit_record.TAGS`; a mask tagged "attack" is used in memory only.

    Raises:
        UserError: an unknown tag.
    """

    indices: Mapping[str, np.ndarray] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    model: str = ""
    weights: str = "none"
    rule: Mapping[str, Any] = field(default_factory=dict)
    tag: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tag", read_tag(self.tag))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the indices."""
        found = hashlib.sha256()
        for name in sorted(self.indices):
            found.update(self.indices[name].tobytes())
        return found.hexdigest()

    @property
    def count(self) -> int:
        """How many weights."""
        return sum(self._counts.values())

    @property
    def size(self) -> int:
        """How many weights the matrices have."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def counts(self) -> dict[str, int]:
        """Matrix -> how many of its weights."""
        return dict(self._counts)

    @cached_property
    def _counts(self) -> dict[str, int]:
        return {name: len(found) for name, found in self.indices.items()}

    def emptied(self) -> Mask:
        """No weights of the same matrices."""
        return replace(self, indices={name: np.zeros(0, np.int64) for name in self.indices}, rule={})

    def inverted(self) -> Mask:
        """All other weights of the same matrices; their indices are made matrix by matrix, when they are asked for."""
        rest = Made(self.indices, lambda name: _others(self.indices[name], math.prod(self.shapes[name])))
        return Mask(rest, self.shapes, self.model, self.weights, {"inverted": dict(self.rule)}, self.tag)


def _others(found: np.ndarray, size: int) -> np.ndarray:
    rest = np.ones(size, bool)
    rest[found] = False
    return np.flatnonzero(rest)


def write_mask(mask: Mask, file: str | Path) -> Path:
    """Writes a mask file; an existing file is not written over.

    Raises:
        UserError: the file exists; the disk refuses.
    """
    file = Path(file)
    check_file(file)
    if file.exists():
        raise UserError(f"{file} exists already. Give another name; nothing was written.")
    rule, shapes = json.dumps(dict(mask.rule), default=str), json.dumps({name: list(shape) for name, shape in mask.shapes.items()})
    metadata = {"format": FORMAT, "model": mask.model, "weights": mask.weights, "shapes": shapes, "rule": rule, "tag": mask.tag}
    metadata["sha256"] = mask.digest
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as partial:
            vectors = [tensor(name, (count,), np.dtype(np.int64)) for name, count in mask.counts().items()]
            write_file(partial, vectors, "int64", (mask.indices[name].astype(np.int64, copy=False) for name in mask.counts()), metadata)
    except OSError as error:
        raise UserError(f"Could not write {file}: {error}. Nothing was kept.") from None
    return file


def read_mask(file: str | Path) -> Mask:
    """Reads a mask file.

    Raises:
        UserError: no such file, or one that is no mask: wrong metadata, other numbers than int64, indices that repeat or lie outside
            their matrix.
    """
    if not Path(file).is_file():
        raise UserError(f"There is no mask file {file}. Make one with `jaxmed prune select`.")
    try:
        with safe_open(file, "np") as held:
            metadata = held.metadata() or {}
            if metadata.get("format", FORMAT) != FORMAT:
                raise UserError(f"{file} is a mask of format {quoted(metadata['format'])}; this version reads {FORMAT!r}.")
            tagged = ("tag",) if "sha256" in metadata else ()  # as this package writes them: without its tag an attack would pass for none
            missing = [key for key in ("format", "shapes", "rule", *tagged) if key not in metadata]
            if missing:
                raise UserError(f"{file} is no mask file: its metadata have no {', '.join(map(repr, missing))}.")
            shapes, rule = _metadata(file, metadata)
            indices = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no readable mask file: {error}.") from None
    problems = [f"{name} has no shape in the metadata" for name in indices.keys() - shapes.keys()]
    problems += [f"{name} is missing" for name in shapes.keys() - indices.keys()]
    for name in indices.keys() & shapes.keys():
        found, size = indices[name], math.prod(shapes[name])
        if found.ndim != 1 or found.dtype != np.int64:  # narrower integers overflow beyond the first rows of a matrix
            problems.append(f"{name} is {found.dtype} {list(found.shape)}, not a vector of int64")
        elif len(found) and (found.min() < 0 or found.max() >= size or (np.diff(found) <= 0).any()):
            problems.append(f"{name} holds indices that are not ascending from 0 to {size - 1}")
    if problems:
        raise all_problems(f"Mask {file}", sorted(problems))
    given = {key: metadata.get(key, "") for key in ("model", "weights", "tag")}
    mask = Mask({name: indices[name] for name in shapes}, shapes, **given, rule=rule)
    if metadata.get("sha256", mask.digest) != mask.digest:
        raise UserError(f"Mask {file} is damaged: its indices are not those that were written. Copy or make it again.")
    return mask


def _metadata(file: str | Path, metadata: Mapping[str, str]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes and rule of a mask file."""
    shapes, rule = parse_json(metadata["shapes"]), parse_json(metadata["rule"])
    if not isinstance(rule, dict):
        raise UserError(f"{file} is no mask file: its rule is {quoted(rule)}; a JSON object is expected.")
    sizes = isinstance(shapes, dict) and all(isinstance(shape, list) for shape in shapes.values())
    if not sizes or not all(type(size) is int and size > 0 for shape in shapes.values() for size in shape):
        raise UserError(f"{file} is no mask file: its shapes are {quoted(shapes)}; lists of sizes by name are expected.")
    return {name: tuple(shape) for name, shape in shapes.items()}, rule


def combine(masks: Sequence[Mask], how: str, any_model: bool = False) -> Mask:
    """The weights that are in all masks ("intersect"), in any ("union"), or in the first and in no other ("subtract").

    With an inverted mask among them, the indices of the result are made when they are asked for, as those of the inverted one are.

    Args:
        any_model: take masks that were made of different weights; the result belongs to none of them, so that applying it takes
            `any_model` too.

    Raises:
        UserError: another word; fewer than two masks; masks of matrices that differ, or of different weights.
    """
    if how not in HOW:
        raise unknown("way to combine masks", how, HOW)
    if len(masks) < 2:
        raise UserError(f"To {how}, give at least two masks.")
    for other in masks[1:]:
        check_same_matrices(masks[0], other)
    made_of = {mask.weights: mask.model for mask in masks}
    if len(made_of) > 1 and not any_model:
        named = ", ".join(f"{model!r} ({weights[:12]})" for weights, model in made_of.items())
        raise UserError(
            f"The masks were made of different weights: {named}. Say that this is meant (--any-model), or combine masks of one."
        )
    weights = masks[0].weights if len(made_of) == 1 else "several: " + ", ".join(sorted(made_of))
    join = {"intersect": np.intersect1d, "union": np.union1d, "subtract": np.setdiff1d}[how]
    made = Made(masks[0].indices, lambda name: reduce(join, (mask.indices[name] for mask in masks)))
    found = made if any(isinstance(mask.indices, Made) for mask in masks) else dict(made)
    rule = {how: [dict(mask.rule) for mask in masks]}
    tag = join_tags(mask.tag for mask in masks)  # an attack stays one
    return Mask(found, masks[0].shapes, masks[0].model, weights, rule, tag)


def check_same_matrices(one: Mask, other: Mask) -> None:
    """Raises a UserError where two masks are of different matrices."""
    if dict(one.shapes) != dict(other.shapes):
        different = sorted(set(one.shapes.items()) ^ set(other.shapes.items()))[:3]
        raise UserError(f"The masks are of different models: {one.model!r} and {other.model!r} ({different[0][0]}, ...).")
