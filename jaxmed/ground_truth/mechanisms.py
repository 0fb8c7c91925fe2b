"""What can be planted by hand: one row of `MECHANISMS` each. A row's effects are closed forms, on logit-diff, without noise.

Every prompt ends with a word that asks, with strength 0.75 in one half of the pairs and 1.25 in the other; effects are means over both.
In most rows base has an alarm word, which makes the answer no, and source has a calm one in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jaxmed.ground_truth.features import Head, Neuron, Part
from jaxmed.ground_truth.pairs import Slots, Words
from jaxmed.ground_truth.words import COLOURS, Mix

SHARES = (0.5, 0.35, 0.15)
"""What each of three last-layer neurons has of their joint effect: two of them reach 80 %."""


@dataclass(frozen=True)
class Mechanism:
    """A planted mechanism.

    Attributes:
        told: what it does.
        parts: name -> what is planted.
        modules: (mediator, layer, position, effect) of whole modules that carry the behaviour.
        joint: names of parts -> the effect of patching them together.
        total: mean y(source) - y(base).
        slots: what the prompts are made of.
        logits: word -> features that its logit reads.
        gating_index: 1 - effect(parts that signal, the last layer's planted neurons held at base) / effect(parts that signal).
    """

    told: str
    parts: Mapping[str, Part]
    modules: tuple[tuple[str, int, int, float], ...]
    total: float
    slots: Slots
    logits: Mapping[str, Mix]
    joint: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    gating_index: float | None = None


def _says(ask: float) -> Mapping[str, Mix]:
    """Logits of yes and no that differ by the feature "answer", plus `ask` times what the last word asks."""
    return {"yes": {"answer": 0.5, "ask": ask / 2}, "no": {"answer": -0.5, "ask": -ask / 2}}


def _colours(base: Words, source: Words) -> tuple[str, str]:
    """Source's colour, and base's or another one."""
    target, other = (next(word for word in words if word in COLOURS) for words in (source, base))
    return target, other if other != target else COLOURS[COLOURS.index(target) - 1]


def _stream(position: int, layers: range, effect: float) -> tuple[tuple[str, int, int, float], ...]:
    """The residual stream where it carries all of an effect."""
    return tuple(("residual_out", layer, position, effect) for layer in layers)


_ALARM = Slots({-5: ("alarm", "calm")})
_GROUP = tuple(f"last {number}" for number in range(1, len(SHARES) + 1))


def _hears(effect: float, kind: str = "reads", key: str = "alarm", written: str = "heard") -> Head:
    """The head of layer 0 that tells the last token whether a word of a kind came before."""
    return Head(0, kind, effect, query="ask", key=key, moves={key: (written, 1.0)})


def _gate() -> Mechanism:
    """The last-layer neurons take away twice what the last word asks, so that the answer is turned, where danger is signalled."""
    last = {
        name: Neuron(3, "gate", 8 * share, when={"danger": 1}, times={"ask": 1}, writes={"answer": -8 * share})
        for name, share in zip(_GROUP, SHARES, strict=True)
    }
    return Mechanism(
        "A group of last-layer neurons multiplies what an early neuron signals: nothing else carries the signal to the answer.",
        {"reader": _hears(8), "signal": Neuron(1, "signals", 8, when={"heard": 1}, writes={"danger": 1}), **last},
        (("attention_out", 0, -1, 8), ("mlp_out", 1, -1, 8), ("mlp_out", 3, -1, 8), *_stream(-1, range(4), 8)),
        8,
        _ALARM,
        _says(4),
        {_GROUP[:2]: 6.8, _GROUP: 8, ("signal", *_GROUP): 8},
        1.0,
    )


def _adder() -> Mechanism:
    """The same single effects as in `_gate`."""
    last = {
        name: Neuron(3, "adder", 8 * share, when={"heard": 1}, writes={"answer": -8 * share})
        for name, share in zip(_GROUP, SHARES, strict=True)
    }
    return Mechanism(
        "A group of last-layer neurons adds to the answer on its own reading of the prompt; the early neuron's signal goes past it.",
        {"reader": _hears(16), "signal": Neuron(1, "signals", 8, when={"heard": 1}, writes={"answer": -8}), **last},
        (("attention_out", 0, -1, 16), ("mlp_out", 1, -1, 8), ("mlp_out", 3, -1, 8), *_stream(-1, range(4), 16)),
        16,
        _ALARM,
        _says(4),
        {_GROUP[:2]: 6.8, _GROUP: 8, ("signal", *_GROUP): 16},
        0.0,
    )


def _pair() -> Mechanism:
    """Base has neither sign, source has both."""
    return Mechanism(
        "Two neurons cooperate: a later neuron needs both. Each alone changes nothing, and so does each of the two heads that read.",
        {
            "reader 1": _hears(0, "cooperates"),
            "reader 2": _hears(0, "cooperates", "siren", "heard too"),
            "neuron 1": Neuron(1, "cooperates", 0, when={"heard": 1}, writes={"first": 1}),
            "neuron 2": Neuron(1, "cooperates", 0, when={"heard too": 1}, writes={"second": 1}),
            "both": Neuron(2, "joins", 8, when={"first": 1, "second": 1}, above=1.25, writes={"answer": 8}),
        },
        (("attention_out", 0, -1, 8), ("mlp_out", 1, -1, 8), ("mlp_out", 2, -1, 8), *_stream(-1, range(4), 8)),
        8,
        Slots({-6: ("calm", "alarm"), -4: ("quiet", "siren")}),
        _says(-4),
        {("neuron 1", "neuron 2"): 8, ("reader 1", "reader 2"): 8, ("reader 1", "neuron 2"): 8},
    )


def _cancel() -> Mechanism:
    return Mechanism(
        "Two neurons of one layer have opposite effects, each larger than the total, and none together; a third one carries the behaviour.",
        {
            "reader": _hears(8),
            "carrier": Neuron(1, "signals", 8, when={"heard": 1}, writes={"answer": -8}),
            "against": Neuron(2, "cancels", 12, when={"heard": 1}, writes={"answer": -12}),
            "for": Neuron(2, "cancels", -12, when={"heard": 1}, writes={"answer": 12}),
        },
        (("attention_out", 0, -1, 8), ("mlp_out", 1, -1, 8), *_stream(-1, range(4), 8)),
        8,
        _ALARM,
        _says(4),
        {("against", "for"): 0, ("carrier", "against"): 20, ("carrier", "against", "for"): 8},
    )


def _copy() -> Mechanism:
    """The classes of base's and source's colour differ from pair to pair."""
    copied = {colour: (f"said {colour}", 1.0) for colour in COLOURS}
    return Mechanism(
        "A head copies the colour that stands earlier in the prompt to the last token. Target is source's colour, foil is base's.",
        {"copier": Head(1, "copies", 16, query="ask", key="colour", moves=copied)},
        (("attention_out", 1, -1, 16), *_stream(-4, range(1), 16), *_stream(-1, range(1, 4), 16)),
        16,
        Slots({-4: ("colour", "colour")}, answers=_colours),
        {colour: {f"said {colour}": 8} for colour in COLOURS},
    )


def _path() -> Mechanism:
    return Mechanism(
        "Information goes from one token by a head to a second, through a neuron there, and by another head to the last.",
        {
            "first head": Head(1, "path", 8, position=-4, query="relay", key="alarm", moves={"alarm": ("heard", 1.0)}),
            "neuron": Neuron(1, "path", 8, position=-4, when={"heard": 1}, writes={"relayed": 1}),
            "second head": Head(2, "path", 8, query="ask", key="relay", moves={"relayed": ("answer", -8.0)}),
        },
        (
            *(("attention_out", 1, -4, 8), ("mlp_out", 1, -4, 8), ("attention_out", 2, -1, 8)),
            *(*_stream(-7, range(1), 8), *_stream(-4, range(1, 2), 8), *_stream(-1, range(2, 4), 8)),
        ),
        8,
        Slots({-7: ("alarm", "calm")}, {-4: "relay"}),
        _says(4),
    )


MECHANISMS: Mapping[str, Mechanism] = MappingProxyType(
    {"gate": _gate(), "adder": _adder(), "pair": _pair(), "cancel": _cancel(), "copy": _copy(), "path": _path()}
)
