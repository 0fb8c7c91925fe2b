"""Pages from templates: everything that is not our own markup is escaped, control characters are written out."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxmed.errors import visible
from jaxmed.reports.packed import packed_plotly


def page_of(template: str, **values: Any) -> str:
    """A page of a template of this package, as text; plotly.js is inside."""
    environment = Environment(
        loader=PackageLoader("jaxmed.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.get_template(template).render(plotly=packed_plotly(), **values)


def _shown(value: Any) -> Any:
    return visible(value) if type(value) is str else value
