"""The settings of the study of mediation; they are the command's flags, too."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmed.gating.spec import GateSpec


@dataclass(frozen=True, kw_only=True)
class MediationSpec(GateSpec):
    """Why does it answer? Layers, modules, neurons and tokens, end to end, with controls."""

    read_at: str = "user_last"
    """Tokens where the request is read: last token of the user's message, or any other position of a sweep."""
    write_at: str = "last"
    """Tokens where the answer is written: the last one of the prompt, or any other position of a sweep."""
    controls: str = "control"
    """Pairs in which the behaviour does not differ (neutral and paraphrase pairs), bundled or yours; empty: none."""
