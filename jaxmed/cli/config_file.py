"""`--config FILE.yaml`: the file's entries become arguments placed before the user's flags, so types are checked once and flags win."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxmed.errors import UserError, unknown


def expand(arguments: list[str], commands: Mapping[str, type], group: str = "") -> list[str]:
    """The arguments with every `--config FILE` replaced by the file's entries.

    A key `command` in the file may name the command (in a group: "prune score"); it must agree with the one on the command line.

    Raises:
        UserError: no such file, not YAML, an unknown key or a nested value; the message names the file.
    """
    rest, files = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--config":
            files.append(next(waiting, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if not files:
        return arguments
    name = rest[0] if rest and not rest[0].startswith("-") else None
    added: list[str] = []
    for file in files:
        entries = _read(file)
        named = entries.pop("command", name)
        named = named.removeprefix(group).strip() if isinstance(named, str) else named
        name = name or named
        if named != name or name not in commands:
            raise UserError(f"{file} is for the command {named!r}, and {name!r} was called. Legal: {', '.join(commands)}.")
        legal = [field.name.replace("_", "-") for field in dataclasses.fields(commands[name])]
        for key, value in entries.items():
            added += _flags(file, str(key), value, legal)
    return [str(name), *added, *(rest[1:] if rest[:1] == [name] else rest)]


def _read(file: str) -> dict[str, Any]:
    try:
        entries = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file!r} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is not valid YAML: {error}") from None
    if not isinstance(entries, dict):
        raise UserError(f"--config {file} holds no 'key: value' entries.")
    return entries


def _flags(file: str, key: str, value: Any, legal: list[str]) -> list[str]:
    flag = key.replace("_", "-")
    if flag not in legal:
        raise unknown(f"key in {file}:", key, legal)
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)):
        raise UserError(f"{file}: {key} holds a nested value; a number, a text or a list of them is expected.")
    return [f"--{flag}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
