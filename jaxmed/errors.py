"""One way to say what is wrong: the wrong value, the legal ones, the nearest match, what to do."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable

LONGEST = 300
"""Characters of a value that a message shows; of one problem, four times as many."""


class UserError(Exception):
    """Wrong usage or bad input. The command line prints the message, without a traceback, and exits with 2."""


class Notice(UserWarning):
    """What a user should know and may go on with. The command line prints the message alone."""


def notice(message: str) -> None:
    """Tells the user something, once per message, and goes on."""
    warnings.warn(message, Notice, stacklevel=3)


def unknown(what: str, got: object, legal: Iterable[object], fix: str = "") -> UserError:
    """The error for a value outside a closed set.

    Args:
        what: what the value is, in words ("outcome", "config key").
        got: the wrong value.
        legal: every legal value.
        fix: one sentence on what to do.
    """
    names = [str(value) for value in legal]
    return UserError(f"Unknown {what} {quoted(got)}.{hint(got, names)} Legal: {', '.join(names) or '(none)'}.{' ' + fix if fix else ''}")


def hint(got: object, legal: Iterable[str]) -> str:
    """A question that names the legal values nearest to a wrong one, with a space before it; "" where none is near."""
    near = difflib.get_close_matches(quoted(got).strip("'"), list(legal), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def all_problems(subject: str, problems: list[str], fix: str = "") -> UserError:
    """One error that lists every problem found in `subject`, so that a file is mended in one round."""
    shown = "\n".join(f"  - {problem[: 4 * LONGEST]}" for problem in problems[:40])
    more = f"\n  (+{len(problems) - 40} more)" if len(problems) > 40 else ""
    return UserError(f"{subject}: {len(problems)} problem{'s' if len(problems) > 1 else ''}:\n{shown}{more}{chr(10) + fix if fix else ''}")


def quoted(value: object) -> str:
    """A value as messages show it: no longer than `LONGEST` characters, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integers of thousands of digits, and no deep nests
        return f"(a value of type {type(value).__name__} that is too large to show)"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
