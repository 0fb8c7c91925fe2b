"""A model in memory: what `load` returns and everything else takes."""

from __future__ import annotations

import copy
import hashlib
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.models.config import ModelConfig
from jaxmed.models.digests import State, file_state, known_digest
from jaxmed.models.params import Params

NAMES = ("adapter", "mask_of")
"""Keys of an edit that hold what a folder or a model was called, and say nothing of the weights."""
Arrays = tuple[weakref.ref, ...]
"""Arrays of parameters, in the order of their tree, none of them kept alive."""


class Later:
    """A value that is made when it is first asked for, once for all that hold it."""

    def __init__(self, make: Callable[[], Any]):
        self.value = cache(make)


class _MadeLater:
    """An attribute whose value is given as it is, or as `Later`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:  # the dataclass asks for a default: there is none
            raise AttributeError(self.name)
        held = model.__dict__[self.name]
        return held.value() if isinstance(held, Later) else held

    def __set__(self, model: Any, value: Any) -> None:
        model.__dict__[self.name] = value


@dataclass
class Model:
    """A loaded model.

    Attributes:
        config: shape and arithmetic.
        params: nested dict of arrays; blocks are stacked on a leading layer axis.
        tokenizer: a transformers tokenizer, or None where the checkpoint has none; that of a quantised file is built at first use.
        mesh: the device mesh the parameters live on, axes "data", "fsdp" and "tensor".
        name, revision: as asked for.
        files: the weight files.
        source: the folder or file it was read from; None for a model made in memory.
        source_config: config.json of the source, as it stands there.
        generation_config: generation_config.json of the source; None where it has none.
        history: what was done to the weights since their publication, as far as it is recorded; oldest first.
        described: the arrays that `files` and `history` describe; see `edited`.
    """

    config: ModelConfig
    params: Params = field(repr=False)
    tokenizer: Any = _MadeLater()  # has no default: the descriptor raises where the class is asked
    mesh: jax.sharding.Mesh  # pyright: ignore[reportGeneralTypeIssues]
    name: str  # pyright: ignore[reportGeneralTypeIssues]
    revision: str | None = None
    files: tuple[Path, ...] = ()
    source: Path | None = None
    source_config: Mapping[str, Any] | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    generation_config: Mapping[str, Any] | None = None
    described: Arrays = field(default=(), repr=False)
    states: tuple[State, ...] = field(default=(), repr=False)  # of the files, when the model was opened
    _taken: dict[tuple[Path, ...], str] = field(default_factory=dict, repr=False)  # digests of files; copies of a model share them
    _hashed: tuple[Arrays, str] = field(default=((), ""), init=False, repr=False)

    def __post_init__(self) -> None:
        mesh = self.mesh if self.mesh.shape.get("fsdp", 1) > 1 else None
        if self.config.mesh != mesh:
            self.config = replace(self.config, mesh=mesh)
        self.states = self.states or _states(self.files)

    @property
    def files_digest(self) -> str:
        """SHA-256 over the weight files (over their digests, where there are several).

        "none" for a model made in memory, and where the files are no longer what was loaded.
        """
        if not self.states or self.states != _states(self.files):
            return "none"
        if self.files not in self._taken:
            found = [known_digest(file) for file in self.files]
            self._taken[self.files] = found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
        return self._taken[self.files]

    @property
    def identity(self) -> str:
        """SHA-256 of all that decides the model's numbers: the weight files, the config, int8, and every edit since.

        Parameters that no file and no recorded edit describes (made in memory, put in by hand, or read from files that have changed
        since) are hashed themselves. Two dtypes of the same files have one identity.
        """
        history = [{key: value for key, value in edit.items() if key not in NAMES} for edit in self.history]
        facts: dict[str, Any] = {"config": _config_facts(self.config), "history": history, "files": self.files_digest}
        if facts["files"] == "none" or not _same(self.described, self.params):
            facts["arrays"] = self._arrays_digest()
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def record(self) -> dict[str, str | None]:
        """What a run notes of the model it uses, and compares when it is resumed."""
        return {"name": self.name, "revision": self.revision, "weights": self.identity, "dtype": self.config.dtype}

    def describe_params(self) -> Model:
        """Notes that `files` and `history` say how the parameters came about; returns the model itself."""
        self.described = _arrays(self.params)
        return self

    def _arrays_digest(self) -> str:
        """SHA-256 of the parameters, in their dtypes; taken once for the same arrays."""
        if not self._hashed[1] or not _same(self._hashed[0], self.params):
            self._hashed = _arrays(self.params), hash_arrays(self.params)
        return self._hashed[1]


def _arrays(params: Params) -> Arrays:
    return tuple(weakref.ref(leaf) for leaf in jax.tree.leaves(params))


def _states(files: tuple[Path, ...]) -> tuple[State, ...]:
    """The state of every file; nothing where one is gone."""
    try:
        return tuple(file_state(file) for file in files)
    except OSError:
        return ()


def _same(arrays: Arrays, params: Params) -> bool:
    leaves = jax.tree.leaves(params)
    return len(leaves) == len(arrays) and all(ref() is leaf for ref, leaf in zip(arrays, leaves, strict=True))


def _config_facts(config: ModelConfig) -> dict[str, str]:
    """The fields that are not at their defaults, so that a field which a later version adds changes no identity.

    Without the dtype and the mesh.
    """
    held = ((entry.name, getattr(config, entry.name), entry.default) for entry in fields(config))
    return {name: repr(value) for name, value, default in held if name not in ("dtype", "mesh") and value != default}


def hash_arrays(params: Params) -> str:
    """SHA-256 over names, shapes, dtypes and values of a nested dict of arrays, whatever devices they lie on."""
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        for row in leaf if leaf.ndim > 2 else (leaf,):  # one layer on the host at a time
            found.update(np.ascontiguousarray(_on_host(row)).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _on_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(array, tiled=True))
    return np.asarray(array)


@dataclass(frozen=True)
class _Beside:
    """What a model is beside its weights, as the static part of a pytree: two are equal where the same programs serve both."""

    model: Model

    def _key(self) -> tuple[Any, ...]:
        model = self.model
        history = json.dumps(model.history, sort_keys=True, default=str)  # or a model would come out of a program with another's history
        return model.config, model.mesh, model.name, model.revision, id(model.__dict__["tokenizer"]), history

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Beside) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        kinds = [edit.get("kind", "an edit") for edit in self.model.history]
        return f"{self.model.name!r} (revision {self.model.revision}, edited by: {kinds})"


def _apart(model: Model) -> tuple[tuple[Params], _Beside]:
    """A model's weights, and what it is beside them: compiled programs hold on to that, and must not keep weights alive."""
    beside = copy.copy(model)
    beside.params = {}
    return (model.params,), _Beside(beside)


def _with_weights(beside: _Beside, children: tuple[Params]) -> Model:
    """The same model with other weights; `described` does not cover them, so `identity` hashes them."""
    model = copy.copy(beside.model)
    (model.params,), model._hashed = children, ((), "")
    return model


jax.tree_util.register_pytree_node(Model, _apart, _with_weights)
