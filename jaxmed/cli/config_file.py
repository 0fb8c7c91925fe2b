"""`--config FILE.yaml`: the file's entries become arguments placed before the user's flags, so types are checked once and flags win."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError, unknown
from jaxmed.files import parse_yaml, read_text


def expand(arguments: list[str], name: str, command: type) -> list[str]:
    """The arguments of a command with every `--config FILE` replaced by the file's entries.

    A key `command` in the file must name the command.

    Raises:
        UserError: no such file, not YAML, an unknown key or a nested value; the message names the file.
    """
    files, rest = _split(arguments)
    added: list[str] = []
    legal = [field.name.replace("_", "-") for field in dataclasses.fields(command)]
    for file in files:
        entries = _read(file)
        named = entries.pop("command", name)
        if named != name:
            raise UserError(f"{file} is for the command {named!r}, and {name!r} was called.")
        for key, value in entries.items():
            added += _flags(file, str(key), value, legal, listed(command))
    return [*added, *rest]


def listed(command: type) -> list[str]:
    """The fields of a command that take several values."""
    return [field.name for field in dataclasses.fields(command) if str(field.type).startswith("tuple")]


def named_command(arguments: list[str]) -> str:
    """The command that the first config file among the arguments names; empty where none does."""
    named = [_read(file).get("command") for file in _split(arguments)[0][:1]]
    return named[0] if named and isinstance(named[0], str) else ""


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The config files among the arguments, and the other arguments."""
    files, rest = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--config":
            files.append(next(waiting, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return files, rest


def _read(file: str) -> dict[str, Any]:
    try:
        entries = parse_yaml(read_text(Path(file), "--config"))
    except ValueError as error:
        raise UserError(f"--config {file} is {error}") from None
    if not isinstance(entries, dict):
        raise UserError(f"--config {file} holds no 'key: value' entries.")
    return entries


def _flags(file: str, key: str, value: Any, legal: list[str], several: list[str]) -> list[str]:
    flag = key.replace("_", "-")
    if flag not in legal:
        raise unknown(f"key in {file}:", key, legal)
    if value is None or (value == [] and key.replace("-", "_") not in several):
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)):
        raise UserError(f"{file}: {key} holds a nested value; a number, a text or a list of them is expected.")
    return [f"--{flag}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
