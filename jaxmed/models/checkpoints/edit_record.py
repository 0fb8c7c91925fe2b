"""What was done to the weights since their publication: kept with every copy that is written, and refused where it is an attack."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxmed.errors import UserError, quoted
from jaxmed.files import IRREGULAR, is_irregular
from jaxmed.models.checkpoints.huggingface import read_json

RECORD, CARD = "jaxmed_edit.json", "README.md"
ATTACK = "attack"
TAGS = ("", "test", "behaviour", "defence", ATTACK)
"""What an edit can be for; what is tagged with the last one is never written. Other words are refused, so that none passes for another."""
KEYS = ("tag", "tags", "jaxmedtag")
"""Letters of the keys that hold a tag."""
Edits = Sequence[Mapping[str, Any]]
"""One mapping per edit, oldest first; JSON values. The key "tag" holds one of `TAGS`, at any depth."""

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


def read_tag(value: Any) -> str:
    """The one of `TAGS` that a value is, whatever its case and the blanks around it; None is "".

    Raises:
        UserError: anything else, such as a list, or a word with a look-alike letter or an invisible character.
    """
    tag = "" if value is None else value.strip(" \t\r\n").lower() if isinstance(value, str) and value.isascii() else value
    if not isinstance(tag, str) or tag not in TAGS:
        shown = quoted(value).encode("ascii", "backslashreplace").decode()  # a look-alike letter is seen
        raise UserError(f"Unknown tag {shown}. Legal: {', '.join(filter(None, TAGS))}, or none.")
    return tag


def join_tags(tags: Iterable[Any]) -> str:
    """The tag of what is made of several things: the strictest of theirs."""
    return max(map(read_tag, tags), key=TAGS.index, default="")


def tags_of(edits: Edits) -> list[Any]:
    """The tags of edits, however their key is spelt and however deep it lies."""
    return [tag for edit in edits for tag in _tags(edit)]


def _tags(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, held in value.items():
            if re.sub("[^a-z]", "", str(key).lower()) in KEYS:
                yield held
            else:
                yield from _tags(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _tags(held)


def refuse_attacks(edits: Edits) -> None:
    """Raises a UserError where an edit is tagged "attack" or with an unknown word: such weights exist in memory only."""
    for edit in edits:
        if join_tags(tags_of([edit])) == ATTACK:
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
        join_tags(tags_of([edit]))
    except (TypeError, ValueError) as error:
        raise UserError(f"An edit is a dict of JSON values that says what was done to the weights: {error}.") from None


def read_edits(source: Path) -> tuple[Mapping[str, Any], ...]:
    """The edits that a model folder records; empty where it records none.

    Raises:
        UserError: a record that is damaged.
    """
    if is_irregular(source / RECORD):
        raise UserError(f"{source / RECORD} {IRREGULAR}. Get the folder again.")
    if not (source / RECORD).is_file():
        return ()
    record = read_json(source / RECORD)
    edits = record.pop("edits", None)
    if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
        raise UserError(f"{source / RECORD} holds no list of edits under 'edits'. It is damaged; get the folder again.")
    return (*edits, *({"tag": tag} for tag in tags_of([record])))


def write_record(folder: Path, source: Mapping[str, Any], edits: Edits) -> None:
    """Writes what was done to the weights of `source` into `folder`."""
    record = {"jaxmed": version("jaxmed"), "source": source, "edits": [dict(edit) for edit in edits]}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_edits(folder: Path, name: str, source: Mapping[str, Any], edits: Edits) -> None:
    """Writes the record and a model card with a warning into `folder`; nothing where there are no edits."""
    if not edits:
        return
    write_record(folder, source, edits)
    lines = "\n".join(f"- {_summary(edit)}" for edit in edits)
    (folder / CARD).write_text(CARD_TEXT.format(title=name, record=RECORD, lines=lines), encoding="utf-8")


def _summary(edit: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in edit.items() if isinstance(value, (str, int, float)))[:300] or "no description"
