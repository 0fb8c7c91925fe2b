"""JSON that holds a digest of itself: one that was damaged, or changed, is noticed where it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError
from jaxmed.files.whole import simple

SEAL = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON holds it, with the digest of all else under `SEAL`."""
    held = {key: value for key, value in simple(content).items() if key != SEAL}
    return {**held, SEAL: hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()}


def is_whole(held: Any) -> bool:
    """Whether JSON is an object whose digest is right, or that has none."""
    return isinstance(held, dict) and (SEAL not in held or sealed(held)[SEAL] == held[SEAL])


def check_seal(held: Any, file: Path) -> Any:
    """The same; a UserError where its digest is there and not right."""
    if isinstance(held, dict) and not is_whole(held):
        fix = f"Make or copy it again; if it was changed on purpose, take its entry {SEAL!r} out."
        raise UserError(f"{file} is damaged, or was changed: it holds something else than was written. {fix}")
    return held
