"""For mkdocstrings: an entry of a docstring that is about several names, `a, b: text`, as one entry for each."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension  # pyright: ignore[reportMissingImports]  (installed with the extra docs, not with test)

ENTRY = re.compile(r"^( {4,})(\w+(?:, \w+)+)(: .*(?:\n\1 +.*)*)", re.M)


class SplitEntries(Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: Any, **rest: Any) -> None:
        """Called by griffe for every object."""
        del rest
        if obj.docstring is not None:
            obj.docstring.value = ENTRY.sub(_split, obj.docstring.value)


def _split(entry: re.Match[str]) -> str:
    indent, first, *others = entry[1], *entry[2].split(", ")
    return "\n".join([f"{indent}{first}{entry[3]}", *(f"{indent}{name}: See `{first}`." for name in others)])
