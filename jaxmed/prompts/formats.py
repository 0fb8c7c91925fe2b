"""Rows of public sets, as their files have them, as columns of an example. The files are the user's; none is bundled.

A row is recognised by its columns: nobody has to name a format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxmed.errors import UserError, quoted

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How the rows of a set are read.

    Attributes:
        columns: those that every row has, whatever is in their cells; a set's other columns are left out.
        read: row -> columns of an example.
        alone: whether its rows have no other columns.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]
    alone: bool = False


def _xstest(row: Row) -> dict[str, Any]:
    label = row.get("label")
    unsafe = label.strip().lower() == "unsafe" if label and isinstance(label, str) else row["type"].startswith("contrast_")
    kind, response = "harmful" if unsafe else "benign", row.get("completion") or row.get("response")
    return {"id": row.get("id"), "prompt": row["prompt"], "response": response, "category": row["type"], "kind": kind}


def _behind(context: Any, prompt: str) -> str:
    return f"{context}\n\n---\n\n{prompt}" if context else prompt


def _harmbench(row: Row) -> dict[str, Any]:
    return {
        "id": row.get("BehaviorID"),
        "prompt": _behind(row.get("ContextString"), row["Behavior"]),
        "category": row.get("SemanticCategory"),
        "kind": "harmful",
    }


def _target(row: Row) -> str:
    target = row["target"] or ""  # a column of pairs files too, which holds lists there
    return target if isinstance(target, str) else "|".join(target)


def _advbench(row: Row) -> dict[str, Any]:
    return {"prompt": row["goal"], "response": _target(row), "kind": "harmful"}


def _instruction(context: str, answer: str) -> Callable[[Row], dict[str, Any]]:
    """How rows of an instruction, a context that may be empty and an answer are read."""

    def read(row: Row) -> dict[str, Any]:
        more = f"\n\n{row[context]}" if row.get(context) else ""
        return {"prompt": row["instruction"] + more, "response": row[answer], "kind": "benign"}

    return read


def _messages(row: Row) -> dict[str, Any]:
    turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
    system = [text for role, text in turns if role == "system"]
    rest = [role for role, _ in turns if role != "system"]
    if rest not in (["user"], ["user", "assistant"]) or len(system) > 1:
        raise UserError(f"messages with the roles {[role for role, _ in turns]}; one user message and at most one answer are expected.")
    said = {role: text for role, text in turns}
    return {"prompt": said["user"], "response": said.get("assistant"), "system": said.get("system")}


FORMATS: dict[str, Format] = {
    "XSTest": Format(("prompt", "type", "focus"), _xstest),
    "HarmBench": Format(("Behavior", "FunctionalCategory"), _harmbench),
    "JailbreakBench": Format(
        ("Goal", "Target", "Behavior"),
        lambda row: {"prompt": row["Goal"], "response": row["Target"], "category": row.get("Category")},
    ),
    "AdvBench": Format(("goal", "target"), _advbench),
    "AdvBench of prompts": Format(("prompt", "target"), lambda row: _advbench({"goal": row["prompt"], "target": row["target"]})),
    "StrongREJECT": Format(
        ("forbidden_prompt",),
        lambda row: {"prompt": row["forbidden_prompt"], "category": row.get("category"), "kind": "harmful"},
    ),
    "HarmBench of prompts": Format(
        ("prompt", "context"),
        lambda row: {**{key: held for key, held in row.items() if key != "context"}, "prompt": _behind(row["context"], row["prompt"])},
    ),
    "AdvBench's strings": Format(("target",), lambda row: {"prompt": _target(row), "kind": "harmful"}, alone=True),
    "JailbreakBench's judged answers": Format(
        ("goal", "prompt", "target_response"),
        lambda row: {"prompt": row["prompt"], "response": row["target_response"]},
    ),
    "Alpaca": Format(("instruction", "output"), _instruction("input", "output")),
    "Dolly": Format(("instruction", "response"), _instruction("context", "response")),
    "messages": Format(("messages",), _messages),
}
"""Set -> how it is read. OR-Bench (prompt, category) needs none; HEx-PHI's files, which have no header, are read as lists of prompts."""


OURS = ("id", "split", "kind", "category")
"""Columns of ours that a set's rows may have besides their own."""


def as_columns(row: Row) -> Row:
    """A row with the columns of an example: of a known set's, or as it is."""
    for name, one in FORMATS.items():
        if all(column in row for column in one.columns) and (not one.alone or len(row) == len(one.columns)):
            try:
                found = one.read(row)
            except (TypeError, AttributeError, KeyError):
                raise UserError(f"a row with the columns of {name} holds other values than texts: {quoted(dict(row))[:200]}") from None
            given = {key: row[key] for key in OURS if row.get(key) is not None}
            found = {**given, **{key: value for key, value in found.items() if value not in (None, "") or key in ("prompt", "response")}}
            return {key: str(value) if key == "id" else value for key, value in found.items()}
    return row
