"""Arguments into a command. Whatever is wrong is said in one message: the wrong value, what is legal, the nearest name."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

import jaxmed
from jaxmed.cli.config_file import expand, listed
from jaxmed.cli.numbers import check_numbers
from jaxmed.errors import UserError, quoted
from jaxmed.files import odd_text
from jaxmed.models.config import parse_layers

DESCRIPTION = "Causal mediation analysis of language models: which layers, modules, heads, neurons and tokens carry a behaviour."
NONE = ("none", "None")


def parse(arguments: Sequence[str], commands: Mapping[str, type], groups: Mapping[str, str]) -> Any:
    """The command that the arguments name, as its dataclass.

    Args:
        commands: full name ("sweep", "prune score") -> dataclass.
        groups: first word of the commands that share one -> what they are for.

    Raises:
        UserError: an unknown command or flag, a value of another type, a missing flag.
        SystemExit: help or the version was asked for, and printed.
    """
    given = list(arguments)
    if given[:1] == ["--version"]:
        print(f"jaxmed {jaxmed.__version__}")
        sys.exit(0)
    name = " ".join(given[: 2 if " ".join(given[:2]) in commands or (given[:1] and given[0] in groups) else 1])
    if name not in commands:
        given = _named_by_file(given, commands, groups)
        name = next((one for one in commands if " ".join(given[: len(one.split())]) == one), name)
    if name not in commands:
        _explain(given, name, commands, groups)
    rest = expand(given[len(name.split()) :], name, commands[name])
    if odd := next((one for one in rest if odd_text(one) and not Path(one).exists()), ""):
        raise UserError(f"The argument {quoted(odd)} holds bytes that are not UTF-8.")
    _check_flags(name, rest, commands)
    _check_values(name, given[len(name.split()) :], commands[name])
    said = io.StringIO()
    if {"-h", "--help"} & set(rest):
        try:
            with contextlib.redirect_stdout(said) if os.environ.get("NO_COLOR") else contextlib.nullcontext():
                return _tyro(name, rest, commands)
        finally:
            print(said.getvalue(), end="")
    try:
        with contextlib.redirect_stderr(said):
            command = _tyro(name, rest, commands)
    except SystemExit as stop:
        raise UserError(f"{unboxed(said.getvalue())} See `jaxmed {name} --help`.") from stop
    check_numbers(command)
    return command


def _tyro(name: str, arguments: Sequence[str], commands: Mapping[str, type]) -> Any:
    command = commands[name]
    description = " ".join((command.__doc__ or "").split())
    return tyro.cli(command, args=arguments, prog=f"jaxmed {name}", description=description, use_underscores=False, registry=TYPES)


def _named_by_file(given: list[str], commands: Mapping[str, type], groups: Mapping[str, str]) -> list[str]:
    """The arguments with the command that a config file names before them, where they begin with none."""
    from jaxmed.cli.config_file import named_command

    words = given[:1] if given[:1] and given[0] in groups else []
    rest = given[len(words) :]
    if rest and not rest[0].startswith("-"):
        return given
    named = named_command(rest)
    return [*named.split(), *rest] if named in commands and named.split()[: len(words)] == words else given


def _explain(given: Sequence[str], name: str, commands: Mapping[str, type], groups: Mapping[str, str]) -> None:
    """Prints what commands there are, or raises a UserError that names those nearest to a wrong one."""
    group = given[0] if given and given[0] in groups else ""
    wrong = given[1:] if group else given
    if wrong and wrong[0].startswith("-") and wrong[0].split("=")[0] not in ("-h", "--help", "--config"):
        near = " Did you mean --version?" if difflib.get_close_matches(wrong[0], ["--version", "-V", "-v"], cutoff=0.6) else ""
        raise UserError(f"There is no command before {quoted(wrong[0])}.{near} `jaxmed --help` lists the commands.")
    if not wrong or wrong[0].startswith("-"):
        print(_overview(group, commands, groups))
        sys.exit(0 if set(given) & {"-h", "--help"} else 2)
    legal = [one for one in commands if not group or one.startswith(f"{group} ")]
    near = [one for one in commands if one.split()[-1] == wrong[0] and not (group and one in legal)]
    for names in (legal, list(commands)):
        shorter = {one.split()[-1]: one for one in names} | {one: one for one in (*names, *({} if group else groups))}
        near = near or [shorter[one] for one in difflib.get_close_matches(wrong[0], shorter, n=3, cutoff=0.6)]
    asked = f" Did you mean {' or '.join(f'`jaxmed {one}`' for one in dict.fromkeys(near))}?" if near else ""
    words = dict.fromkeys(one.split()[1 if group else 0] for one in legal)
    raise UserError(f"There is no command {quoted(f'{group} {wrong[0]}'.strip())}.{asked} Legal: {', '.join(words)}.")


def _overview(group: str, commands: Mapping[str, type], groups: Mapping[str, str]) -> str:
    """The commands and what each is for."""
    lines = [f"usage: jaxmed {group or 'COMMAND'} {'COMMAND ' * bool(group)}[FLAGS]", "", groups.get(group, DESCRIPTION), ""]
    about = {one: (kind.__doc__ or "").strip().splitlines()[0] for one, kind in commands.items() if one.startswith(group)}
    if not group:
        about = {one: text for one, text in about.items() if " " not in one} | dict(groups)
    width = max(len(one.split()[-1]) for one in about)
    for one, text in about.items():
        first, *more = textwrap.wrap(text, 78 - width)
        lines += [f"  {one.split()[-1]:{width}}  {first}", *(f"  {'':{width}}  {line}" for line in more)]
    return "\n".join(
        [*lines, "", f"`jaxmed {f'{group} ' * bool(group)}COMMAND --help` lists the flags of a command, `jaxmed --version` its version."]
    )


def _check_flags(name: str, arguments: Sequence[str], commands: Mapping[str, type]) -> None:
    """Raises a UserError for a flag that the command does not have, and for one that it needs and does not get."""
    legal, given = flags_of(commands[name]), set()
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if argument == "--":
            break
        if not re.fullmatch(r"--[a-zA-Z][\w-]*", flag):
            continue
        given.add(flag)
        if flag not in legal:
            near = difflib.get_close_matches(flag, [one for one in legal if not one.startswith("--no-")], n=3, cutoff=0.7)
            others = [one for one, kind in commands.items() if flag in flags_of(kind)]
            elsewhere = f" {flag} is a flag of {', '.join(f'`jaxmed {one}`' for one in others[:4])}." if others else ""
            near = [RENAMED[flag], *near] if flag in RENAMED and RENAMED[flag].split()[0] in legal else near
            asked = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"`jaxmed {name}` has no flag {flag}.{asked}{elsewhere} See `jaxmed {name} --help`.")
    needed = [f"--{one.name.replace('_', '-')}" for one in dataclasses.fields(commands[name]) if one.default is dataclasses.MISSING]
    missing = [flag for flag in needed if flag not in given]
    if missing and not {"-h", "--help"} & {*given, *arguments}:
        raise UserError(f"`jaxmed {name}` needs {' and '.join(missing)}. See `jaxmed {name} --help`.")


def _check_values(name: str, arguments: Sequence[str], command: type) -> None:
    """Raises a UserError for a flag of several values that is given none. A config file may write an empty list, and mean it."""
    several = {f"--{field.replace('_', '-')}" for field in listed(command)}
    for argument, after in zip(arguments, [*arguments, "--"][1:], strict=True):
        if argument in several and re.match(r"--(?![.\d])", after):
            raise UserError(f"{argument} needs a value. See `jaxmed {name} --help`.")


def flags_of(command: type) -> list[str]:
    """The flags of a command."""
    names = [one.name.replace("_", "-") for one in dataclasses.fields(command)]
    return [*(f"--{one}" for one in names), *(f"--no-{one}" for one in names), "--help"]


SAID = (
    (r"Error parsing (--[\w-]+): (?:--[\w-]+ )?(.*)", r"\1: \2"),
    (r"Missing value for argument '(.*?)'.*", r"\1 needs a value"),
    (r"invalid choice (.*) for argument '(.*?)'. Expected one of \((.*?),?\)", r"\2: \1 is not one of \3"),
    (r"Unrecognized options?: (.*?)(?: Perhaps you meant.*)?", r"there is no place for \1; a flag begins with --"),
)
"""What tyro says, and how it is said here."""


def unboxed(text: str) -> str:
    """A message of tyro's without its frame and its pointer to the help, on one line."""
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    kept = [line for line in lines[1:] if line.strip("- ")]
    stop = next((at for at, line in enumerate(kept) if line.startswith(("For full helptext", "Argument helptext"))), len(kept))
    said = " ".join(kept[:stop] or lines).rstrip(".")
    for pattern, words in SAID:
        if match := re.fullmatch(pattern, said):
            return f"{match.expand(words)}."
    return f"{said}."


def _spec(metavar: str, words: str, read: Callable[[str], Any], empty: bool) -> PrimitiveConstructorSpec[Any]:
    def make(arguments: list[str]) -> Any:
        if empty and arguments[0] in NONE:
            return None
        try:
            return read(arguments[0])
        except (ValueError, OverflowError):
            raise ValueError(f"{quoted(arguments[0])} is not {words}") from None

    return PrimitiveConstructorSpec(1, metavar, make, _is_single, lambda value: ["none" if value is None else str(value)])


def _is_single(value: Any) -> bool:
    return value is None or not isinstance(value, (list, tuple, dict))


def _whole(text: str) -> int:
    number = float(text)
    if number != int(number):
        raise ValueError
    return int(number) if set(text) - set("+-0123456789") else int(text)


SINGLE: dict[Any, tuple[str, str, Callable[[str], Any]]] = {
    int: ("INT", "a whole number", _whole),
    float: ("NUMBER", "a number, such as 0.001 or 1e-3", float),
    str: ("TEXT", "a text", str),
    Path: ("PATH", "a path", Path),
}
"""Type -> what stands for it in the help, what it is in words, and how it is read."""
RENAMED = {"--raw": "--form text (or plain, space, qa)", "--examples": "--refusal-examples"}
"""Flags of earlier versions, and what stands for them now."""
TYPES = ConstructorRegistry()


@TYPES.primitive_rule
def _single(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Single values, and those that may be left out: types are said in words, and a default of nothing is no type of its own."""
    for kind, (metavar, words, read) in SINGLE.items():
        if info.type == kind or info.type == (kind | None):
            return _spec(metavar, words, read, info.type != kind)
    return None


@TYPES.primitive_rule
def _layers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Whole numbers in a row, as layers are written: 9,19,20-29."""
    if info.type != tuple[int, ...]:
        return None

    def make(arguments: list[str]) -> tuple[int, ...]:
        try:
            return tuple(number for text in arguments if text != "all" for number in parse_layers(text) or ())
        except UserError as error:
            raise ValueError(str(error).rstrip(".")) from None

    return PrimitiveConstructorSpec("*", "9,19,20-29", make, _is_layers, lambda value: [",".join(map(str, value)) or "all"])


def _is_layers(value: Any) -> bool:
    return isinstance(value, tuple)
