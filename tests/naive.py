"""The oracle of the exact engine: one full forward per patched unit and answer text, outcomes computed in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax

import jaxmed as jm
from jaxmed.effects.mediators import MEDIATORS, units_of
from jaxmed.interventions.edits import Edit
from jaxmed.models.model import Model
from jaxmed.prompts import PromptPair
from jaxmed.tokens import Patch, align, render

LENGTH = 48
"""Everything is padded to this many tokens on the right, where causal attention cannot see it: one compilation per site."""


def _padded(ids: np.ndarray) -> np.ndarray:
    assert len(ids) <= LENGTH
    return np.concatenate([ids, np.zeros(LENGTH - len(ids), np.int32)])


def _logits(model: Model, ids: np.ndarray, edits: Any = None) -> np.ndarray:
    return np.asarray(jm.forward(model, _padded(ids), edits)[0][0, : len(ids)], np.float64)


def _answer_scores(model: Model, prompt: np.ndarray, text: str, edits: Any) -> np.ndarray:
    """Log-probability of every token of a text, teacher-forced after the prompt."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    fed = np.concatenate([prompt, np.asarray(ids[:-1], np.int32)])
    rows = log_softmax(_logits(model, fed, edits), axis=-1)[len(prompt) - 1 :]
    return rows[np.arange(len(ids)), ids]


def outcome(model: Model, pair: PromptPair, side: str, name: str, edits: Any = None) -> float:
    """The outcome of a run of one side of a pair."""
    prompt = render(model.tokenizer, pair, side).ids
    first = lambda texts: [model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts]  # noqa: E731
    last = _logits(model, prompt, edits)[-1]
    if name == "log-odds":
        return float(np.logaddexp.reduce(last[first(pair.target)]) - np.logaddexp.reduce(last[first(pair.foil)]))
    if name == "logit-diff":
        return last[first(pair.target)[0]] - last[first(pair.foil)[0]]
    if name == "logprob":
        return float(np.logaddexp.reduce(log_softmax(last)[first(pair.target)]))
    if name == "kl":
        source = log_softmax(_logits(model, render(model.tokenizer, pair, "source").ids)[-1])
        return -float(np.sum(np.exp(source) * (source - log_softmax(last))))
    if name == "sequence-logprob":
        return float(_answer_scores(model, prompt, pair.response or "", edits).sum())
    if name == "prefix-gap":
        means = lambda texts: np.mean([_answer_scores(model, prompt, text, edits).mean() for text in texts])  # noqa: E731
        return float(means(pair.target) - means(pair.foil))
    raise ValueError(name)


def swap(model: Model, pair: PromptPair, patch: Patch, unit: str, layer: int, index: int, window: int) -> dict[str, Edit]:
    """The edit that gives one unit its source value at the patched tokens; dense, unlike anything the engine does."""
    return {site: _dense(np.asarray(_source(model, pair)[site]), patch, unit, layer, index, window) for site in MEDIATORS[unit].sites}


def moving(model: Model, pair: PromptPair, patch: Patch, sites: tuple[str, ...]) -> np.ndarray:
    """Source minus base at the patched tokens of the base prompt, zero elsewhere, summed over sites: [L,1,T,...]."""
    base, source = (jm.forward(model, _padded(render(model.tokenizer, pair, side).ids), taps=sites)[1] for side in ("base", "source"))
    found = np.zeros(base[sites[0]].shape, np.float32)
    for here, there in zip(patch.base, patch.source, strict=True):
        found[:, 0, here] += sum(np.asarray(source[site])[:, 0, there] - np.asarray(base[site])[:, 0, here] for site in sites)
    return found


def by_unit(model: Model, unit: str, values: np.ndarray, window: int) -> np.ndarray:
    """Values [1,T,...] of elements of a layer's sites, summed over tokens and the elements of each unit: [count]."""
    mediator = MEDIATORS[unit]
    elements = values.sum((0, 1)).reshape(model.config.sizes[mediator.axis] if mediator.axis else 1, -1).sum(1)
    return elements.reshape(mediator.count(model.config, window), -1).sum(1)


def _dense(source: np.ndarray, patch: Patch, unit: str, layer: int, index: int, window: int) -> Edit:
    gate, value = np.zeros(source.shape, np.float32), np.zeros(source.shape, np.float32)
    of_neurons = dict.fromkeys(("neuron", "gate", "up"), slice(index, index + 1))
    units = {**of_neurons, "window": slice(index * window, (index + 1) * window), "head_out": index}.get(unit, slice(None))
    for base, other in zip(patch.base, patch.source, strict=True):
        gate[layer, 0, base, units] = 1.0
        value[layer, 0, base, units] = source[layer, 0, other, units]
    return Edit(gate, value, np.float32(0.0))


_SOURCES: dict[Any, Any] = {}


def _source(model: Model, pair: PromptPair) -> Any:
    """Activations of the source run at every swapped site."""
    key = (model.name, model.config, pair.source)
    if key not in _SOURCES:
        sites = tuple(sorted({site for unit in units_of(model.config) for site in MEDIATORS[unit].sites}))
        taken = jm.forward(model, _padded(render(model.tokenizer, pair, "source").ids), taps=sites)[1]
        _SOURCES[key] = {name: np.asarray(a, np.float32) for name, a in taken.items()}
    return _SOURCES[key]


def effects(model: Model, pair: PromptPair, position: str | int, unit: str, layer: int, index: int, name: str, window: int) -> list[float]:
    """Effects of one unit at every patch of a position."""
    base, source = render(model.tokenizer, pair, "base"), render(model.tokenizer, pair, "source")
    unpatched = outcome(model, pair, "base", name)
    return [
        outcome(model, pair, "base", name, swap(model, pair, patch, unit, layer, index, window)) - unpatched
        for patch in align(base, source, position)
    ]
