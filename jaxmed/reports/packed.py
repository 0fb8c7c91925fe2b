"""Figures and plotly.js inside a page; plotly.js compressed, for it is most of a page's bytes."""

from __future__ import annotations

import base64
import gzip
from functools import cache

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs


@cache
def packed_plotly() -> Markup:
    """plotly.js as base64 of gzip, the same bytes every time; a page's script inflates it."""
    return Markup(base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode())


def embedded(plot: go.Figure) -> Markup:
    """A figure as JSON that cannot end its script element."""
    return Markup((plot.to_json() or "{}").replace("<", "\\u003c"))
