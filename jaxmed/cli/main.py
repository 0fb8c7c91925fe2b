"""Entry point: `jaxmed COMMAND`. Exit codes: 0 done, 2 wrong usage or bad input, 130 and 143 after SIGINT and SIGTERM."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jaxmed.cli.bench import Bench
from jaxmed.cli.commands import Demo, Models, Report, Sweep
from jaxmed.cli.config_file import expand
from jaxmed.cli.convert import Convert
from jaxmed.cli.evaluate import Evaluate
from jaxmed.cli.finetune import Finetune
from jaxmed.cli.generate import Generate
from jaxmed.cli.parity import Parity
from jaxmed.cli.prune import Apply, Combine, Compare, Score, Select
from jaxmed.cli.prune_measure import Compression, Curve, Transfer
from jaxmed.cli.prune_trials import Attack, Dissociation
from jaxmed.cli.study import Pruning
from jaxmed.errors import Notice, UserError
from jaxmed.runs import signals
from jaxmed.runs.folder import RUN

DISK = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.ENOENT, errno.EISDIR)
"""Errors of files that a user can mend."""
COMMANDS: dict[str, type] = {
    "demo": Demo,
    "models": Models,
    "sweep": Sweep,
    "report": Report,
    "bench": Bench,
    "parity": Parity,
    "convert": Convert,
    "generate": Generate,
    "finetune": Finetune,
    "evaluate": Evaluate,
}
PRUNE: dict[str, type] = {
    "score": Score,
    "select": Select,
    "apply": Apply,
    "combine": Combine,
    "compare": Compare,
    "curve": Curve,
    "transfer": Transfer,
    "compression": Compression,
    "dissociation": Dissociation,
    "attack": Attack,
}
GROUPS: dict[str, tuple[dict[str, type], str]] = {
    "prune": (PRUNE, "Weights that carry a behaviour: score them, select a mask by rule, apply it, and measure what is lost."),
    "study": ({"pruning": Pruning}, "The published analyses, end to end, each with its figures and tables on one page."),
}
"""Commands that have commands of their own, and what they are for."""


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments name, as its dataclass. Wrong usage exits with 2."""
    given, name = list(arguments), "jaxmed"
    commands, description = COMMANDS, DESCRIPTION
    if given[:1] and given[0] in GROUPS:
        group = given.pop(0)
        (commands, description), name = GROUPS[group], f"jaxmed {group}"
        given = expand(given, commands, group)
    else:
        given = expand(given, commands)
    if len(commands) == 1:
        # tyro takes a union of one for no union
        if given[:1] != [only := next(iter(commands))]:
            print(f"usage: {name} {only} [-h] [OPTIONS]\n\n{description}\n\n{only}: {(commands[only].__doc__ or '').strip()}")
            sys.exit(0 if set(given) & {"-h", "--help"} else 2)
        return tyro.cli(commands[only], args=given[1:], prog=f"{name} {only}", description=description, use_underscores=False)
    union: Any = None
    kinds = {**commands, **({} if commands is not COMMANDS else {name: _group(name, text) for name, (_, text) in GROUPS.items()})}
    for command, kind in kinds.items():
        summary = (kind.__doc__ or "").strip()
        one = Annotated[kind, tyro.conf.subcommand(command, description=summary, prefix_name=False)]
        union = one if union is None else union | one
    return tyro.cli(union, args=given, prog=name, description=description, use_underscores=False)


def _group(name: str, text: str) -> type:
    """A line of the help for a command that has commands of its own; `parse` handles those before."""
    return dataclasses.make_dataclass(name.title(), [], namespace={"__doc__": text}, frozen=True)


DESCRIPTION = "Causal mediation analysis of language models: which layers, modules, heads, neurons and tokens carry a behaviour."


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    """A notice as a line of its own; other warnings as Python shows them."""
    own = f"jaxmed: {message}\n"
    (file or sys.stderr).write(own if issubclass(category, Notice) else warnings.formatwarning(message, category, filename, lineno, line))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _show_warning
    arguments = sys.argv[1:] if arguments is None else arguments
    with signals.handled():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    """Parses and runs a command; turns what ends it into a message and an exit code."""
    command: Any = None
    try:
        command = parse(arguments)
        return command.run() or 0
    except UserError as error:
        print(f"jaxmed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        kept = ""
        if hasattr(command, "resume") and (command.out / RUN).is_file():
            again = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
            kept = f" What was finished is kept in {command.out}; continue with: jaxmed {shlex.join(again)}"
        print(f"\njaxmed: interrupted{f' by {error}' if str(error) else ''}.{kept}", file=sys.stderr)
        return signals.exit_code(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(f"jaxmed: {error.filename or 'The disk'}: {error.strerror}. What was finished before is kept.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
