"""Reasoning that a model writes before its answer, and how it is cut off."""

from __future__ import annotations

import re
from collections.abc import Sequence

Marks = Sequence[tuple[str, str]]
"""(opening, closing) texts of reasoning."""
REASONING: Marks = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<analysis>", "</analysis>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""As Qwen, DeepSeek, Granite, OpenThinker, Seed, Mistral, Kimi, gpt-oss, Gemma and Command write it, and as prompts ask for it.

A new kind is one row.
"""


def cut_reasoning(text: str, marks: Marks = REASONING) -> str:
    """The answer alone: what follows the last closing mark, or an empty text where an opening mark at the start is never closed.

    A closing mark without an opening one counts: many chat templates write the opening mark into the prompt. Capitals do not matter.
    """
    if not marks:
        return text
    openings, closings = (re.compile("|".join(map(re.escape, side)), re.IGNORECASE) for side in zip(*marks, strict=True))
    ends = [found.end() for found in closings.finditer(text)]
    answer = text[ends[-1] :] if ends else text
    return "" if openings.match(answer.lstrip()) else answer
