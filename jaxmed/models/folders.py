"""Where things are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where fetched models are kept: `JAXMED_CACHE`, or `jaxmed` in the user's cache folder."""
    if "JAXMED_CACHE" in os.environ:
        return Path(os.environ["JAXMED_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxmed"
