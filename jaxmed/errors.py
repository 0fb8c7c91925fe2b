"""One way to say what is wrong: the wrong value, the legal ones, the nearest match, what to do."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

LONGEST = 300
"""Characters of a value that a message shows; of one problem, four times as many."""
LONGEST_MESSAGE = 60_000
MOST_NAMES = 100
"""Legal values that a message lists."""
MOST_ALIKE, MOST_PROBLEMS = 10, 40
"""Problems of one kind, and of all kinds, that a message lists; the others are counted."""
NOT_FINITE = "The weights hold numbers that are not finite, or the model's arithmetic overflows (try --dtype float32)."
"""What a reader of NaN should look for."""


class UserError(Exception):
    """Wrong usage or bad input. The command line prints the message, without a traceback, and exits with 2.

    Whatever stands in the message, names and texts of files included, it is inert in a terminal and of a bounded length.
    """

    def __init__(self, message: object = ""):
        text = visible(str(message)[: 2 * LONGEST_MESSAGE])
        super().__init__(text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ... (the message is longer)")


class Notice(UserWarning):
    """What a user should know and may go on with. The command line prints the message alone."""


def notice(message: str) -> None:
    """Tells the user something, once per message, and goes on."""
    warnings.warn(visible(message), Notice, stacklevel=3)


def check_seed(seed: object) -> None:
    """Raises a UserError for a seed that random generators do not take."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"The seed {quoted(seed)} is out of range: whole numbers from 0 to {2**32 - 1:,}.")


def unknown(what: str, got: object, legal: Iterable[object], fix: str = "") -> UserError:
    """The error for a value outside a closed set.

    Args:
        what: what the value is, in words ("outcome", "config key").
        got: the wrong value.
        legal: every legal value.
        fix: one sentence on what to do.
    """
    names = [str(value) for value in legal]
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    listed = ", ".join(names[:MOST_NAMES]) or "(none)"
    return UserError(f"Unknown {what} {quoted(got)}.{hint(got, names)} Legal: {listed}{more}.{' ' + fix if fix else ''}")


def hint(got: object, legal: Iterable[str]) -> str:
    """A question that names the legal values nearest to a wrong one, with a space before it; "" where none is near."""
    near = difflib.get_close_matches(quoted(got).strip("'"), list(legal)[: 10 * MOST_NAMES], n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def all_problems(subject: str, problems: Sequence[str], fix: str = "") -> UserError:
    """One error that lists the problems found in `subject`, so that a file is mended in one round: at most ten of a kind, then a count.

    Problems that differ in numbers and quoted values alone are of a kind.
    """
    kinds: Counter[str] = Counter()
    shown: list[str] = []
    for problem in problems:
        kind = _VALUES.sub("", problem[:LONGEST])
        kinds[kind] += 1
        if kinds[kind] <= MOST_ALIKE and len(shown) < MOST_PROBLEMS:
            shown.append(f"  - {problem[: 4 * LONGEST]}")
    if left := len(problems) - len(shown):
        shown.append(f"  (+{left:,} more, of {len(kinds):,} kind{'s' if len(kinds) > 1 else ''} in all)")
    count = f"{len(problems):,} problem{'s' if len(problems) > 1 else ''}"
    return UserError("\n".join([f"{subject}: {count}:", *shown, *([fix] if fix else [])]))


_VALUES = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")


def visible(text: str) -> str:
    """The text with every character that prints nothing (control, bidirectional, surrogate) written out, line ends kept."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def quoted(value: object) -> str:
    """A value as messages show it: no longer than `LONGEST` characters, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integers of thousands of digits, and no deep nests
        return f"(a value of type {type(value).__name__} that is too large to show)"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
