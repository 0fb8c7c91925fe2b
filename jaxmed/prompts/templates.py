"""Texts with named places, such as rubrics and questions."""

from __future__ import annotations

import re


def fill(text: str, **values: str) -> str:
    """`text` with every `{name}` replaced by the value of that name; other braces stay, and what is filled in is not searched again."""
    places = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({places})\}}", lambda found: values[found[1]], text) if values else text
