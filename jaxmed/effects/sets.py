"""Joint sets and paths: what is patched together, and what may respond to it; as named in a file or in Python."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.effects.mediators import MEDIATORS, Unit, units_of
from jaxmed.errors import UserError, all_problems, quoted, unknown
from jaxmed.files import read_json
from jaxmed.interventions.sites import has_site
from jaxmed.models.config import ModelConfig


@dataclass(frozen=True)
class UnitSet:
    """Units of any kinds and layers that are patched together: their joint effect is computed jointly, never added up.

    Attributes:
        name: of the set, in tables.
        units: (mediator, layer, index); indices as in the tables of single units.
        held: units that keep their base values, at every token, while those respond that are not held: what of the effect does not go
            through them.
    """

    name: str
    units: tuple[Unit, ...]
    held: tuple[Unit, ...] = ()

    @property
    def first(self) -> int:
        """The lowest layer."""
        return min(layer for _, layer, _ in self.units)


@dataclass(frozen=True)
class UnitPath:
    """A sender and the receivers that respond to it: path patching (Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023).

    The sender takes its source value and everything between it and the receivers stays as in the base run; the receivers take the values
    that they have then, and the rest of the model responds to them alone.
    """

    name: str
    sender: Unit
    receivers: tuple[Unit, ...]

    @property
    def first(self) -> int:
        """The lowest layer of a receiver."""
        return min(layer for _, layer, _ in self.receivers)


Membership = dict[str, np.ndarray]
"""Site -> bool [L, R, n]: which of its n units each of R rows patches; n is 1 where a site has one."""


def membership(config: ModelConfig, rows: Sequence[Sequence[Unit]], window: int, kinds: Sequence[str]) -> Membership:
    """The units of every row as masks of all sites of these kinds; a unit that is named twice counts once."""
    sizes = {site: config.sizes[MEDIATORS[kind].axis] if MEDIATORS[kind].axis else 1 for kind in kinds for site in MEDIATORS[kind].sites}
    found = {site: np.zeros((config.layers, len(rows), size), bool) for site, size in sorted(sizes.items())}
    for number, units in enumerate(rows):
        for kind, layer, index in units:
            width = MEDIATORS[kind].width(window)
            for site in MEDIATORS[kind].sites:
                found[site][layer, number, index * width : (index + 1) * width] = True
    return found


def layer_windows(layers: int, width: int, kinds: Sequence[str] = ("attention_out", "mlp_out", "both_out")) -> tuple[UnitSet, ...]:
    """Sets of modules of `width` adjacent layers, for every place of the window: "mlp_out 3-7" (causal tracing: Meng et al. 2022).

    Raises:
        UserError: a width that is not 1 to `layers`.
    """
    if not 1 <= width <= layers:
        raise UserError(f"--layer-window {width} is out of range: 1 to {layers} layers.")
    firsts = range(layers - width + 1)
    units = {(kind, first): tuple((kind, layer, 0) for layer in range(first, first + width)) for kind in kinds for first in firsts}
    return tuple(UnitSet(f"{kind} {first}-{first + width - 1}", members) for (kind, first), members in units.items())


def kinds_of(units: Iterable[Unit]) -> tuple[str, ...]:
    """The kinds of units."""
    return tuple(dict.fromkeys(kind for kind, _, _ in units))


def check_sets(config: ModelConfig, sets: Sequence[UnitSet], window: int) -> tuple[UnitSet, ...]:
    """The sets; a UserError that lists all of their problems."""
    problems = _repeated_names(sets)
    for one in sets:
        problems += [] if one.units else [f"set {one.name!r} has no units"]
        problems += [f"set {one.name!r}: {text}" for text in _set_problems(config, one, window)]
    if problems:
        raise all_problems("sets", problems)
    return tuple(sets)


def _set_problems(config: ModelConfig, one: UnitSet, window: int) -> list[str]:
    wrong = [text for unit in (*one.units, *one.held) for text in _unit_problems(config, unit, window)]
    if wrong or not one.units:
        return wrong
    both = [unit for unit in dict.fromkeys(one.held) if unit in one.units]
    early = [unit for unit in dict.fromkeys(one.held) if unit[1] < one.first]
    return [f"{_show(unit)} is patched and held" for unit in both] + [
        f"{_show(unit)} is held, but nothing is patched before it: it keeps its value anyway" for unit in early
    ]


def check_paths(config: ModelConfig, paths: Sequence[UnitPath], window: int) -> tuple[UnitPath, ...]:
    """The paths; a UserError that lists all of their problems, receivers that come before their sender among them."""
    problems = _repeated_names(paths)
    for one in paths:
        wrong = [text for unit in (one.sender, *one.receivers) for text in _unit_problems(config, unit, window)]
        wrong += [] if one.receivers else ["it has no receivers"]
        if not wrong:
            wrong = [f"{_show(unit)} does not come after the sender {_show(one.sender)}" for unit in one.receivers if not _after(one, unit)]
        problems += [f"path {one.name!r}: {text}" for text in wrong]
    if problems:
        raise all_problems("paths", problems)
    return tuple(paths)


def _after(path: UnitPath, receiver: Unit) -> bool:
    """Whether the sender's vector is in the residual stream that the receiver reads."""
    (kind, layer, _), (sender, begin, _) = receiver, path.sender
    if "residual_out" in MEDIATORS[kind].sites:
        return False  # it carries the sender itself
    reads_mid = "attention_out" not in MEDIATORS[kind].sites and not MEDIATORS[kind].mid
    return layer > begin or (layer == begin and MEDIATORS[sender].mid and reads_mid)


def _repeated_names(named: Sequence[UnitSet] | Sequence[UnitPath]) -> list[str]:
    names = [one.name for one in named]
    return [f"the name {name!r} is given {names.count(name)} times" for name in dict.fromkeys(names) if names.count(name) > 1]


def _show(unit: Unit) -> str:
    return f"{unit[0]} {unit[1]}.{unit[2]}" if MEDIATORS[unit[0]].axis else f"{unit[0]} {unit[1]}"


def _unit_problems(config: ModelConfig, unit: Unit, window: int) -> list[str]:
    kind, layer, index = unit
    if kind not in MEDIATORS:
        return [str(unknown("unit", kind, MEDIATORS))]
    if not all(has_site(config.sizes, site) for site in MEDIATORS[kind].sites):
        return [f"{kind} is no unit of this model; legal: {', '.join(units_of(config))}"]
    if not 0 <= layer < config.layers:
        return [f"{kind} names layer {layer}; legal: 0 to {config.layers - 1}"]
    count = MEDIATORS[kind].count(config, window)
    return [] if 0 <= index < count else [f"{kind} of layer {layer} names index {index}; legal: 0 to {count - 1}"]


def read_sets(file: Path) -> tuple[UnitSet, ...]:
    """The sets of a JSON file: [{"name": "gate", "units": [["neuron", 29, 17], ["head_out", 3, 2]], "held": [["mlp_out", 11]]}].

    Units that are held may be left out.

    Raises:
        UserError: no such file, or entries that are no sets, all named.
    """
    return tuple(UnitSet(name, *map(tuple, units)) for name, *units in _entries(file, "units", optional="held"))


def as_set(name: str, given: Any) -> UnitSet:
    """A set of what a caller gave: a list of units, or {"units": [...], "held": [...]}.

    Raises:
        UserError: it is none.
    """
    entry = {"name": name, **given} if isinstance(given, Mapping) else {"name": name, "units": list(given)}
    name, *units = _entry(entry, ("units",), "held")
    return UnitSet(name, *map(tuple, units))


def read_paths(file: Path) -> tuple[UnitPath, ...]:
    """The paths of a JSON file: [{"name": "p", "sender": ["neuron", 5, 17], "receivers": [["head_out", 9, 1], ["mlp_out", 11]]}].

    Raises:
        UserError: no such file, or entries that are no paths, all named.
    """
    return tuple(UnitPath(name, sender, tuple(receivers)) for name, sender, receivers in _entries(file, "sender", "receivers"))


def _entries(file: Path, *fields: str, optional: str = "") -> list[tuple[Any, ...]]:
    entries = read_json(file, "a list of sets or paths")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file} holds no list of objects with the entries name, {', '.join(fields)}.")
    found, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(_entry(entry, fields, optional))
        except UserError as error:
            problems.append(f"entry {number}: {error}")
    if problems:
        raise all_problems(str(file), problems)
    return found


def _entry(entry: Any, fields: tuple[str, ...], optional: str = "") -> tuple[Any, ...]:
    if not isinstance(entry, Mapping) or not {"name", *fields} <= set(entry) <= {"name", *fields, optional}:
        also = f" (and {optional}, if any)" * bool(optional)
        raise UserError(f"{quoted(entry)} is no object with the entries name, {', '.join(fields)}{also}")
    fields += (optional,) * (optional in entry)
    name = entry["name"]
    if not isinstance(name, str) or not name:
        raise UserError(f"the name is {quoted(name)}; a text is expected")
    return (name, *(as_unit(entry[field]) if field == "sender" else _units(field, entry[field]) for field in fields))


def _units(field: str, given: Any) -> list[Unit]:
    if not isinstance(given, list):
        raise UserError(f"{field} is {quoted(given)}; a list of units is expected")
    return [as_unit(one) for one in given]


def as_unit(given: Any) -> Unit:
    """A unit (mediator, layer, index) of what a file or a caller gave; the index may be left out where a layer has one such unit.

    Raises:
        UserError: it is none.
    """
    parts = list(given) if isinstance(given, list | tuple) else []
    whole = [operator.index(one) for one in parts[1:] if isinstance(one, int | np.integer) and not isinstance(one, bool)]
    if not whole or not isinstance(parts[0], str) or len(parts) not in (2, 3) or len(whole) != len(parts) - 1:
        raise UserError(f'a unit is a list such as ["neuron", 29, 17] or ["mlp_out", 11], not {quoted(given)}')
    if len(parts) == 2 and parts[0] in MEDIATORS and MEDIATORS[parts[0]].axis:
        raise UserError(f"{parts[0]} of layer {parts[1]} needs an index")
    return parts[0], whole[0], whole[1] if len(whole) == 2 else 0
