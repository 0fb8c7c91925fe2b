"""Pictures of a page's figures, beside it."""

from __future__ import annotations

import re
import shutil
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import plotly.io

from jaxmed.errors import UserError, unknown

FORMATS = ("svg", "png", "pdf")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FIGURE = re.compile(r'<script type="application/json" class="figure" data-plot="([^"]*)">(.*?)</script>', re.S)
WIDTH = 900
"""Pixels of a picture that the figure leaves open."""


def check_images(formats: tuple[str, ...]) -> None:
    """Raises a UserError for formats that are none, and where nothing can draw pictures."""
    for one in formats:
        if one not in FORMATS:
            raise unknown("picture format", one, FORMATS)
    if formats and find_spec("kaleido") is None:
        raise UserError("Pictures need the extra images: pip install 'jaxmed[images]'.")
    if formats and not any(map(shutil.which, BROWSERS)):
        raise UserError(
            "Pictures are drawn by Chrome or Chromium, and none is installed here. The page has a camera button at every figure."
        )


def write_images(page: Path, formats: tuple[str, ...]) -> list[Path]:
    """Writes every figure of a page as PAGE-NAME.svg and the like, and returns their paths.

    Raises:
        UserError: what `check_images` raises.
    """
    check_images(formats)
    written = []
    for name, data in _FIGURE.findall(page.read_text(encoding="utf-8")):
        figure = plotly.io.from_json(data, skip_invalid=True)
        figure.update_layout(width=figure.layout.width or WIDTH, paper_bgcolor="white")
        for one in formats:
            file = page.with_name(f"{page.stem}-{unescape(name)}.{one}")
            figure.write_image(file, scale=1 if one == "svg" else 2)
            written.append(file)
    return written
