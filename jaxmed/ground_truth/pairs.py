"""Prompt pairs for planted models: groups that share their filling words, and controls in which nothing happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxmed.ground_truth.words import ANY, CLASSES
from jaxmed.prompts.pair import PromptPair

LENGTH = 10
"""Tokens of a prompt, begin-of-sequence included."""
GROUPS, PER_GROUP = 12, 2
Words = Sequence[str]


def _yes_or_no(base: Words, source: Words) -> tuple[str, str]:
    del base, source
    return "yes", "no"


@dataclass(frozen=True)
class Slots:
    """What base and source prompts are made of, by position from the right. All other words are fillers, and the last one asks.

    Attributes:
        signals: classes of base's and source's word, where the two differ.
        shared: class of the word that both have.
        answers: words of base and source -> (target, foil).
    """

    signals: Mapping[int, tuple[str, str]]
    shared: Mapping[int, str] = field(default_factory=dict)
    answers: Callable[[Words, Words], tuple[str, str]] = _yes_or_no


def make_pairs(slots: Slots, seed: int) -> list[PromptPair]:
    """Pairs in `GROUPS` groups: `PER_GROUP` with the behaviour, and one control, in which base and source differ in words that do nothing.

    Controls are in turn "neutral" (both sides like source) and "paraphrase" (both like base). Half of the groups is for discovery.
    """
    rng = np.random.default_rng([seed, 2])
    found = []
    for group in range(GROUPS):
        ask, like = ("weak", "strong")[group % 2], ("neutral", "paraphrase")[group // 2 % 2]
        around = [*rng.choice(CLASSES["filler"], LENGTH - 2).tolist(), CLASSES[ask][0]]
        split = "discovery" if group < GROUPS / 2 else "heldout"
        for number, control in enumerate(("",) * PER_GROUP + (like,)):
            base, source = _sides(slots, around, control, rng)
            target, foil = slots.answers(base, source)
            texts = " ".join(base), " ".join(source), (" " + target,), (" " + foil,)
            name = f"{group}-{control or number}"
            found.append(PromptPair(name, *texts, category=ask, group=str(group), split=split, control=control))
    return found


def _sides(slots: Slots, around: list[str], control: str, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Words of base and source. A control has words of one class where others signal, and another filler in one place."""
    base, source = list(around), list(around)
    for position, kind in slots.shared.items():
        base[position] = source[position] = str(rng.choice(ANY[kind]))
    for position, kinds in slots.signals.items():
        of_base, of_source = {"": kinds, "neutral": (kinds[1],) * 2, "paraphrase": (kinds[0],) * 2}[control]
        base[position] = str(rng.choice(ANY[of_base]))
        source[position] = base[position]
        if not control or len(set(kinds)) > 1 < len(ANY[of_source]):  # words of one kind on both sides signal by which they are
            source[position] = str(rng.choice([word for word in ANY[of_source] if word != base[position]]))
    if control:
        place = int(rng.choice([at for at in range(-len(around), -1) if at not in {*slots.signals, *slots.shared}]))
        base[place], source[place] = (str(word) for word in rng.choice(CLASSES["filler"], 2, replace=False))
    return base, source
