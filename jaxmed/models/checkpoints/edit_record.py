"""What was done to the weights since their publication: kept with every copy that is written, and refused where it is an attack."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError
from jaxmed.models.checkpoints.huggingface import read_json

RECORD, CARD = "jaxmed_edit.json", "README.md"
ATTACK = "attack"
Edits = Sequence[Mapping[str, Any]]
"""One mapping per edit, oldest first; JSON values. The key "tag" says what it is for."""

CARD_TEXT = """---
library_name: transformers
tags: [jaxmed, edited-weights]
---

# {title}, edited

> **Warning.** These are not the published weights of {title}: they were changed for research, with jaxmed. What the changes do to
> the model's behaviour, its refusals and its skills included, is known only where it was measured. An edit that reduces a harmful
> behaviour does not remove it, and may damage others. Evaluate before any use, and do not deploy it as if it were {title}.
> The licence and the terms of the original model hold for this one.

What was done, oldest first (in full in `{record}`):

{lines}
"""


def refuse_attacks(edits: Edits) -> None:
    """Raises a UserError where an edit is tagged "attack": such weights exist in memory only."""
    for edit in edits:
        if str(edit.get("tag") or "").strip().lower() == ATTACK:
            raise UserError(
                f"The weights carry an edit tagged {ATTACK!r} ({_summary(edit)}). Attack conditions are for measuring, in memory only; "
                "they are not written. Load the model without it to convert or export."
            )


def check_edit(edit: Mapping[str, Any]) -> None:
    """Raises a UserError where an edit is no mapping of JSON values."""
    try:
        if not isinstance(edit, Mapping):
            raise TypeError(f"it is a {type(edit).__name__}")
        json.dumps(dict(edit))
    except (TypeError, ValueError) as error:
        raise UserError(f"An edit is a dict of JSON values that says what was done to the weights: {error}.") from None


def read_edits(source: Path) -> tuple[Mapping[str, Any], ...]:
    """The edits that a model folder records; empty where it records none.

    Raises:
        UserError: a record that is damaged.
    """
    if not (source / RECORD).is_file():
        return ()
    edits = read_json(source / RECORD).get("edits")
    if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
        raise UserError(f"{source / RECORD} holds no list of edits under 'edits'. It is damaged; get the folder again.")
    return tuple(edits)


def write_edits(folder: Path, name: str, source: Mapping[str, Any], edits: Edits) -> None:
    """Writes the record and a model card with a warning into `folder`; nothing where there are no edits."""
    if not edits:
        return
    record = {"jaxmed": version("jaxmed"), "source": source, "edits": [dict(edit) for edit in edits]}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = "\n".join(f"- {_summary(edit)}" for edit in edits)
    (folder / CARD).write_text(CARD_TEXT.format(title=name, record=RECORD, lines=lines), encoding="utf-8")


def _summary(edit: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in edit.items() if isinstance(value, (str, int, float)))[:300] or "no description"
