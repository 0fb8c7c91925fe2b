"""Entry point: `jaxmed COMMAND`. Exit codes: 0 done, 2 wrong usage or bad input, 130 and 143 after SIGINT and SIGTERM."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxmed.cli import show
from jaxmed.cli.agreement import Agreement
from jaxmed.cli.answers import Answers
from jaxmed.cli.apply import Apply
from jaxmed.cli.attack import Attack
from jaxmed.cli.bench import Bench, BenchCache, BenchGenerate, BenchLoad, BenchPlan
from jaxmed.cli.cache import CacheInfo, CacheVerify, CacheWrite
from jaxmed.cli.check import Check
from jaxmed.cli.circuit import Circuit
from jaxmed.cli.compression import Compression
from jaxmed.cli.convert import Convert
from jaxmed.cli.curve import Curve, Transfer
from jaxmed.cli.demo import Demo
from jaxmed.cli.dissociation import Dissociation
from jaxmed.cli.evaluate import Evaluate
from jaxmed.cli.finetune import Finetune
from jaxmed.cli.gate import Gate
from jaxmed.cli.generate import Generate
from jaxmed.cli.mask import Combine, Compare, Select
from jaxmed.cli.mediation import Mediation
from jaxmed.cli.misalignment import Misalignment
from jaxmed.cli.models import Models
from jaxmed.cli.parity import Parity
from jaxmed.cli.parser import parse
from jaxmed.cli.probe import ProbeFit, ProbeSearch
from jaxmed.cli.probe_use import ProbeEvaluate, ProbeScore
from jaxmed.cli.report import Report
from jaxmed.cli.score import Score
from jaxmed.cli.status import Status
from jaxmed.cli.study import Pruning
from jaxmed.cli.sweep import Sweep
from jaxmed.cli.trace import Trace
from jaxmed.errors import Notice, UserError, quoted, visible
from jaxmed.files import PART
from jaxmed.hosts import for_all, leads, several
from jaxmed.memory import keep_freed_memory
from jaxmed.runs import signals
from jaxmed.runs.folder import RUN
from jaxmed.runs.watch import log_json

DISK = frozenset("ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOENT ENOTDIR EISDIR ENAMETOOLONG ELOOP ESTALE".split())
"""Errors of files that a user can mend."""
NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")
"""What XLA says where a device's memory is too small, accelerators and CPUs."""
COMMANDS: dict[str, type] = {
    "demo": Demo,
    "models": Models,
    "check": Check,
    "sweep": Sweep,
    "trace": Trace,
    "gate": Gate,
    "answers": Answers,
    "circuit": Circuit,
    "agreement": Agreement,
    "report": Report,
    "status": Status,
    "generate": Generate,
    "evaluate": Evaluate,
    "cache write": CacheWrite,
    "cache info": CacheInfo,
    "cache verify": CacheVerify,
    "finetune": Finetune,
    "probe search": ProbeSearch,
    "probe fit": ProbeFit,
    "probe score": ProbeScore,
    "probe evaluate": ProbeEvaluate,
    "prune score": Score,
    "prune select": Select,
    "prune apply": Apply,
    "prune combine": Combine,
    "prune compare": Compare,
    "prune curve": Curve,
    "prune transfer": Transfer,
    "prune compression": Compression,
    "prune dissociation": Dissociation,
    "prune attack": Attack,
    "study mediation": Mediation,
    "study pruning": Pruning,
    "study misalignment": Misalignment,
    "parity": Parity,
    "convert": Convert,
    "bench generate": BenchGenerate,
    "bench load": BenchLoad,
    "bench cache": BenchCache,
    "bench plan": BenchPlan,
    "bench": Bench,
}
GROUPS: dict[str, str] = {
    "cache": "Activations of many prompts in a folder: write them once, read a layer of them at a time.",
    "probe": "A cheap read-out of prompts: how likely openings of refusal and agreement are. Search openings, fit, score, evaluate.",
    "prune": "Weights that carry a behaviour: score them, select a mask by rule, apply it, and measure what is lost.",
    "study": "The published analyses, end to end, each with its figures and tables on one page.",
}
"""First words that several commands share, and what those commands are for."""


def _show_warning(
    told: set[str], message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A notice as a line of its own, once, whatever told of it; other warnings as Python shows them."""
    own = f"jaxmed: {message}\n"
    if issubclass(category, Notice) and own in told:
        return
    told.add(own)
    (file or sys.stderr).write(own if issubclass(category, Notice) else warnings.formatwarning(message, category, filename, lineno, line))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    keep_freed_memory()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = partial(_show_warning, set())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal has no characters for is written out
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    with signals.handled():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    """Parses and runs a command; turns what ends it into a message and an exit code."""
    command: Any = None
    try:
        command = parse(arguments, COMMANDS, GROUPS)
        log_json(getattr(command, "log_json", False))
        return command.run() or 0
    except UserError as error:
        if leads():
            print(f"jaxmed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        kept = ""
        if getattr(command, "out", None) and hasattr(command, "resume") and _holds_a_run(command.out):
            again = [*for_all(arguments), *([] if "--resume" in arguments else ["--resume"])]
            where = ", in every process" if several() else ""
            kept = f" What was finished is kept in {command.out}; continue with{where}: jaxmed {shlex.join(again)}"
        if leads():
            print(f"\njaxmed: interrupted{f' by {error}' if str(error) else ''}.{kept}", file=sys.stderr, flush=True)
        if several() and not getattr(error, "together", False):
            os._exit(signals.exit_code(error))  # the others do not come to an orderly end that would wait for them
        return signals.exit_code(error)
    except BrokenPipeError:
        show.close_pipe()
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) not in DISK:
            raise
        where = quoted(str(error.filename)) if error.filename else "The disk"
        print(f"jaxmed: {where}: {error.strerror}. What was finished before is kept.", file=sys.stderr)
        return 2
    except Exception as error:
        if not (isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY)):
            raise
        fix = "Give fewer or shorter rows, less at once, --dtype bfloat16, or a larger machine"
        print(f"jaxmed: the memory does not hold this ({visible(str(error))[:200]}). {fix}; what was finished is kept.", file=sys.stderr)
        return 2
    return 0


def _holds_a_run(out: Path) -> bool:
    """Whether there is something to resume: a file that is a run's record, a folder with one, or a file that is written piece by piece."""
    return any(one.is_file() for one in (out, out / RUN, Path(f"{out}{PART}")))


if __name__ == "__main__":
    sys.exit(main())
