"""Numbers that no flag can mean, refused before a command looks at anything."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from jaxmed.errors import UserError

SIGNED = frozenset("patch_factor factor layer control_layer grades".split())
"""Flags whose numbers may be negative."""
COUNTED = frozenset("top tokens seeds samples judge_tokens answers variants beams length keep".split())
"""Flags of which there is one at least, where they say so by their defaults."""
LARGEST = 2**32
"""No count comes near, and seeds end below."""
OWN = frozenset("limit pairs profile_pairs".split())
"""Flags whose commands say themselves what a number leaves."""


def check_numbers(command: Any) -> None:
    """Raises a UserError for a flag of a command whose number is negative, not finite, or none where one is needed."""
    for one in fields(command):
        value, flag = getattr(command, one.name), f"--{one.name.replace('_', '-')}"
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float) or one.name in OWN:
                continue
            if not math.isfinite(number):
                raise UserError(f"{flag} {number} is no finite number.")
            if abs(number) > LARGEST and isinstance(number, int):
                raise UserError(f"{flag} {number:.3g} is more than any run takes. Give at most {LARGEST:,}.")
            if number < 0 and one.name not in SIGNED:
                raise UserError(f"{flag} {number} is negative, which it cannot be.")
            if number == 0 and one.name in COUNTED and one.default:
                raise UserError(f"{flag} 0 leaves nothing to do. Give at least 1.")
