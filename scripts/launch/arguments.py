"""What the launch scripts share: flags, then `--` and a jaxmed command; one message for bad input; a dry run. No package is needed."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

SEVERAL = ("sweep", "trace", "cache write")
"""Commands that run as several processes."""
NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"
"""A name in a cluster or a cloud."""


class Parser(argparse.ArgumentParser):
    """Flags of one script; those of all: --workdir, --env and --dry-run."""

    def __init__(self, told: str):
        super().__init__(description=told, allow_abbrev=False, usage="%(prog)s [flags] -- jaxmed COMMAND [its flags]")
        self.add_argument("--workdir", default="", help="folder in which the command starts, on every host")
        self.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the command; may be repeated")
        self.add_argument("--dry-run", action="store_true", help="prints what would be run or submitted, and does nothing")

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        refuse(message)

    def read(self, given: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and the words of the jaxmed command, which are checked."""
        words = list(sys.argv[1:] if given is None else given)
        split = words.index("--") if "--" in words else len(words)
        flags = self.parse_args(words[:split])
        for one in flags.env:
            need(r"[A-Za-z_]\w*=[^\n]*", "--env", one, "NAME=VALUE")
        need(r"[^\n]*", "--workdir", flags.workdir, "a folder")
        return flags, words[split + 1 :]


def refuse(message: str) -> NoReturn:
    """Ends the script with one message and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def need(pattern: str, flag: str, value: str, legal: str) -> None:
    """Refuses a flag's value that has not the form of `pattern`."""
    if not re.fullmatch(pattern, value):
        refuse(f"{flag} {value!r}: give {legal}.")


def checked(command: Sequence[str]) -> list[str]:
    """The jaxmed command, where it may run as several processes and leaves --hosts to the script."""
    example = "-- jaxmed sweep --unit neuron --out runs/big"
    if not command or Path(command[0]).name != "jaxmed":
        refuse(f"give the jaxmed command after `--`, such as {example}; there is {shlex.join(command) or 'nothing'!r}.")
    if not {" ".join(command[1:2]), " ".join(command[1:3])} & {*SEVERAL}:
        refuse(f"jaxmed {' '.join(command[1:2])} runs as one process. Those of several: {', '.join(SEVERAL)}.")
    if any(word.split("=")[0] == "--hosts" for word in command):
        refuse("leave out --hosts: the script gives it to every process.")
    if any(character < " " for word in command for character in word):
        refuse("a word of the command holds a line break or another control character.")
    return list(command)


def resumed(command: Sequence[str]) -> list[str]:
    """The command with --resume, for what starts again by itself."""
    return [*command, *([] if "--resume" in command else ["--resume"])]


def with_env(flags: argparse.Namespace, command: Sequence[str]) -> list[str]:
    """The command after the variables that it is given."""
    return [*(["env", *flags.env] if flags.env else []), *command]


def show(words: Sequence[str], text: str = "") -> None:
    """Prints a command as a shell takes it, with what it reads."""
    print(shlex.join(words) + (f" <<'END'\n{text.rstrip()}\nEND" if text else ""))


def run(words: Sequence[str], text: str = "") -> int:
    """Runs a command, which reads `text`, or takes this process's place; its exit code."""
    try:
        if not text:
            sys.stdout.flush()
            os.execvp(words[0], list(words))
        return subprocess.run(list(words), input=text, text=True).returncode
    except FileNotFoundError:
        refuse(f"{words[0]} is not installed here, or not on PATH. --dry-run shows what would be run.")
