"""One way to say what is wrong: the wrong value, the legal ones, the nearest match, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong usage or bad input. The command line prints the message, without a traceback, and exits with 2."""


def unknown(what: str, got: object, legal: Iterable[object], fix: str = "") -> UserError:
    """The error for a value outside a closed set.

    Args:
        what: what the value is, in words ("outcome", "config key").
        got: the wrong value.
        legal: every legal value.
        fix: one sentence on what to do.
    """
    names = [str(value) for value in legal]
    near = difflib.get_close_matches(str(got), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return UserError(f"Unknown {what} {got!r}.{hint} Legal: {', '.join(names) or '(none)'}.{' ' + fix if fix else ''}")


def all_problems(subject: str, problems: list[str], fix: str = "") -> UserError:
    """One error that lists every problem found in `subject`, so that a file is mended in one round."""
    shown = "\n".join(f"  - {problem}" for problem in problems[:40])
    more = f"\n  (+{len(problems) - 40} more)" if len(problems) > 40 else ""
    return UserError(f"{subject}: {len(problems)} problem{'s' if len(problems) > 1 else ''}:\n{shown}{more}{chr(10) + fix if fix else ''}")
