"""Reasoning that a model writes before its answer, and how it is cut off."""

from __future__ import annotations

from collections.abc import Sequence

Marks = Sequence[tuple[str, str]]
"""(opening, closing) texts of reasoning."""
REASONING: Marks = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""As Qwen, DeepSeek, Granite, Seed, Mistral, Kimi, gpt-oss, Gemma and Command write it. A new kind is one row."""


def cut_reasoning(text: str, marks: Marks = REASONING) -> str:
    """The answer alone: what follows the last closing mark, or an empty text where an opening mark at the start is never closed.

    A closing mark without an opening one counts: many chat templates write the opening mark into the prompt.
    """
    ends = [at + len(close) for _, close in marks if (at := text.rfind(close)) >= 0]
    answer = text[max(ends) :] if ends else text
    return "" if answer.lstrip().startswith(tuple(opening for opening, _ in marks)) else answer
