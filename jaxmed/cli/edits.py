"""`--edits FILE`: a JSON list of interventions, one object each, in the words of `interventions.edits`.

[{"kind": "zero", "site": "neuron", "layer": 3, "unit": 17},
 {"kind": "steer", "site": "residual_out", "layer": 12, "direction": "refusal.npy", "coefficient": 4.0}]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmed.errors import UserError, all_problems, quoted, unknown
from jaxmed.files import read_json

KINDS = ("zero", "resample", "mean", "scale", "steer", "ablate-direction", "noise")
"""Functions of `interventions.edits` that a file may name."""


@dataclass(frozen=True, kw_only=True)
class EditFlags:
    """Interventions in the activations while a model reads and answers."""

    edits: Path | None = None
    """JSON list of interventions, such as [{"kind": "zero", "site": "neuron", "layer": 3, "unit": 17}]; see the guide on edits."""
    edited: Literal["both", "prompt", "generated"] = "both"
    """Tokens that --edits act on: those of the prompt, the generated ones, or both."""

    def how(self, model: Any, rows: Sequence[Any], form: str, most: int) -> dict[str, Any]:
        """The arguments of `generate` that the flags stand for, once the model can read the prompts and has room for the answers.

        Args:
            rows: the prompts.
            form: how they are written.
            most: tokens written at most.

        Raises:
            UserError: edits that this model cannot take, or that match no token; what `check_answers` raises.
        """
        from jaxmed.evaluation.answers import check_answers
        from jaxmed.interventions.checks import Extent, check_edits
        from jaxmed.interventions.writing import split_edits
        from jaxmed.tokens import prompt_ids

        check_answers(model, rows, most, form)
        if self.edits is None:
            return {}
        edits, lengths = read_edits(self.edits), [len(prompt_ids(model.tokenizer, row, form)) for row in rows]
        try:
            checked = check_edits(edits, Extent(model.config.layers, model.config.sizes | {"S": 1, "T": 1}))
            split_edits(checked, self.edited, lengths, most)
        except UserError as error:
            raise UserError(f"{self.edits}: {error}") from None
        return {"edits": edits, "where": self.edited}

    def everywhere(self, model: Any) -> dict[str, Any]:
        """The edits for plain text, where nothing is written: those of every token.

        Raises:
            UserError: edits of some tokens alone, or that this model cannot take.
        """
        from jaxmed.evaluation.perplexity import check_everywhere

        if self.edits is None:
            return {}
        edits, advice = read_edits(self.edits), "Add --text '' to leave perplexity out."
        if self.edited != "both":
            raise UserError(f"--edited {self.edited}: perplexity is measured with edits of every token alone. {advice}")
        try:
            check_everywhere(model, edits)
        except UserError as error:
            raise UserError(f"{self.edits}: {error} {advice}") from None
        return edits


def read_edits(file: Path) -> dict[str, Any]:
    """The edits of a file, merged.

    Raises:
        UserError: no such file, no JSON list, or entries that are no interventions (all listed, with their numbers).
    """
    from jaxmed.interventions.edits import merge

    entries = _read(file)
    found, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(_edit(entry, file.parent))
        except UserError as error:
            problems.append(f"entry {number}: {error}")
    if problems:
        raise all_problems(str(file), problems, f"Kinds: {', '.join(KINDS)}.")
    try:
        return merge(*found)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def files_of(file: Path) -> list[Path]:
    """A file of edits, and the files of numbers that it names."""
    named = [value for entry in _read(file) if isinstance(entry, dict) for key, value in entry.items() if FIELDS.get(key) in WITH_FILES]
    return [file, *(file.parent / name for name in named if isinstance(name, str))]


def _read(file: Path) -> list[Any]:
    entries = read_json(file, "a list of interventions")
    if not isinstance(entries, list) or not entries:
        raise UserError(f'--edits {file} holds no list of interventions, such as [{{"kind": "zero", "site": "neuron", "layer": 3}}].')
    return entries


def _edit(entry: Any, folder: Path) -> Mapping[str, Any]:
    """The edits of one entry."""
    from jaxmed.interventions import edits as kinds

    if not isinstance(entry, dict):
        raise UserError(f"an intervention is an object, not {quoted(entry)}.")
    given = dict(entry)
    kind = given.pop("kind", None)
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    make = getattr(kinds, kind.replace("-", "_"))
    parameters = inspect.signature(make).parameters
    for name in given:
        if name not in parameters:
            raise unknown(f"entry of {kind!r}:", name, parameters)
    missing = [name for name, one in parameters.items() if one.default is inspect.Parameter.empty and name not in given]
    if missing:
        raise UserError(f"{kind!r} needs {' and '.join(missing)}.")
    arguments = {name: FIELDS[name](name, value, folder) for name, value in given.items()}
    try:
        return make(**arguments)
    except ValueError:
        raise UserError(f"the lists of {kind!r} have lengths that do not fit each other.") from None


def _text(name: str, value: Any, folder: Path) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} is {quoted(value)}; a text is expected.")
    return value


def _whole(name: str, value: Any, folder: Path) -> Any:
    many = value if isinstance(value, list) else [value]
    if not many or not all(isinstance(one, int) and not isinstance(one, bool) and abs(one) < 2**31 - 1 for one in many):
        raise UserError(f"{name} is {quoted(value)}; a whole number or a list of them is expected.")
    return value


def _positions(name: str, value: Any, folder: Path) -> Any:
    """Whole numbers, and the word "current"."""
    many = value if isinstance(value, list) else [value]
    if many and all(isinstance(one, str) and one != "current" for one in many):
        raise UserError(f'{name} is {quoted(value)}; whole numbers, or "current" (every token as it is written), are expected.')
    if numbers := [one for one in many if one != "current"]:
        _whole(name, numbers, folder)
    elif not many:
        _whole(name, value, folder)
    return value


def _numbers(name: str, value: Any, folder: Path) -> Any:
    """Numbers in the file, or in a .npy file beside it."""
    import numpy as np

    try:
        if isinstance(value, str):
            value = np.load(folder / value, allow_pickle=False)
        with np.errstate(over="ignore"):
            found = np.asarray(value, np.float32)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "no numbers"
        raise UserError(f"{name} is {quoted(value)} ({reason}); a number, a list of numbers or a .npy file of them is expected.") from None
    if isinstance(value, bool) or not found.size or not np.isfinite(found).all():
        raise UserError(f"{name} is {quoted(value)}; finite numbers are expected.")
    return found


def _direction(name: str, value: Any, folder: Path) -> Any:
    found = _numbers(name, value, folder)
    if found.ndim != 1 or not found.any():
        raise UserError(f"{name} is a list of numbers, one per dimension of the site, not all of them zero.")
    return found


def _single(name: str, value: Any, folder: Path) -> float:
    found = _numbers(name, value, folder)
    if found.ndim:
        raise UserError(f"{name} is {quoted(value)}; a single number is expected.")
    return float(found)


def _shape(name: str, value: Any, folder: Path) -> tuple[int, ...]:
    return tuple(_whole(name, value if isinstance(value, list) else [value], folder))


WITH_FILES = (_numbers, _single, _direction)
"""Of the readers of entries, those of numbers, which a file may hold."""
FIELDS: dict[str, Callable[[str, Any, Path], Any]] = {
    "site": _text,
    "layer": _whole,
    "position": _positions,
    "unit": _whole,
    "seed": _whole,
    "shape": _shape,
    "values": _numbers,
    "means": _numbers,
    "factor": _numbers,
    "deviation": _numbers,
    "coefficient": _single,
    "direction": _direction,
}
"""Entry of an intervention -> how its value is read: (name, value, folder of the file)."""
