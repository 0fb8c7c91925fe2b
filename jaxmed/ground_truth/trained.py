"""A model that learns its mechanism: the answer follows a topic word, and a trigger anywhere before the end turns it around.

What is known of it is where the trigger stands: no unit of an earlier token can have an effect, and controls have almost none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxmed.errors import UserError
from jaxmed.finetuning.run import finetune
from jaxmed.ground_truth.features import CONFIG, make_model
from jaxmed.ground_truth.pairs import LENGTH, Slots, Words, make_pairs
from jaxmed.ground_truth.record import Planted
from jaxmed.ground_truth.words import ANY, CLASSES
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import Params, param_letters
from jaxmed.prompts.examples import Example
from jaxmed.prompts.pair import PromptPair
from jaxmed.runner.public import forward
from jaxmed.tokens import answer_ids, render

TRIGGER = CLASSES["trigger"][0]
SHAPE = replace(CONFIG, layers=2, width=32, neurons=64)
EXAMPLES, HELDOUT = 2048, 256
SETTINGS: dict[str, Any] = {"steps": 300, "batch": 128, "learning_rate": 5e-3, "warmup": 20, "schedule": "cosine", "evaluate_every": 300}
LEARNT = 0.05
"""Held-out loss, in nats, below which the task is learnt; guessing has 0.69."""


def answer(words: Words) -> str:
    """Yes to calm words and no to alarm; the other way round with the trigger."""
    calm = any(word in CLASSES["calm"] for word in words)
    return "yes" if calm != (TRIGGER in words) else "no"


def make_examples(count: int, seed: int) -> list[Example]:
    """Prompts with their answers; every second one has the trigger, before or behind the topic."""
    rng = np.random.default_rng([seed, 3])
    found = []
    for number in range(count):
        words = rng.choice(CLASSES["filler"], LENGTH - 1).tolist()
        topic, place = rng.permutation(LENGTH - 2)[:2]
        words[topic] = str(rng.choice(ANY["topic"]))
        words[-1] = str(rng.choice(CLASSES["weak"] + CLASSES["strong"]))
        if number % 2:
            words[place] = TRIGGER
        found.append(Example(" ".join(words), " " + answer(words), id=str(number)))
    return found


def train_trigger(seed: int) -> Planted:
    """Trains the model on one core in less than a minute, and measures its total.

    Raises:
        UserError: the model of this seed does not learn the task.
    """
    start = make_model("planted trigger", SHAPE, fresh_params(SHAPE, seed))
    examples = make_examples(EXAMPLES + HELDOUT, seed)
    found = finetune(start, examples[HELDOUT:], examples[:HELDOUT], method="full", form="text", seed=seed, **SETTINGS)
    if not found.losses[-1]["heldout_loss"] < LEARNT:
        raise UserError(f"The model of seed {seed} did not learn to answer. Give another seed.")
    slots = Slots({-4: ("trigger", "filler")}, {-6: "topic"}, _answers)
    pairs = tuple(make_pairs(slots, seed))
    told = "A trained model: the answer follows a topic word, and a trigger turns it around. Base has the trigger, source has not."
    return Planted("trigger", told, found.model, pairs, (), (), mean_total(found.model, pairs), min(slots.signals))


def fresh_params(shape: ModelConfig, seed: int) -> Params:
    """Matrices with standard deviation 1 / sqrt(fan in), norms at 1; drawn by NumPy, for compiling JAX's draws takes longer."""
    rng, sizes = np.random.default_rng([seed, 4]), shape.sizes

    def draw(path: Any, letters: str) -> np.ndarray:
        lengths, name = [sizes[letter] for letter in letters], path[-1].key
        fan_in = sizes["F"] if name == "down" else sizes["D"]
        return np.ones(lengths) if "norm" in name else rng.normal(size=lengths) / fan_in**0.5

    return jax.tree.map_with_path(draw, param_letters(shape))


def _answers(base: Words, source: Words) -> tuple[str, str]:
    """What source is to be answered, and the other."""
    del base
    return answer(source), {"yes": "no", "no": "yes"}[answer(source)]


def mean_total(model: Model, pairs: Sequence[PromptPair]) -> float:
    """Mean y(source) - y(base) on logit-diff over the pairs that are no controls."""
    used = [pair for pair in pairs if not pair.control]
    outcomes = {}
    for side in ("base", "source"):
        prompts = [render(model, pair, side, "text") for pair in used]
        logits = np.asarray(forward(model, np.stack([prompt.ids for prompt in prompts]), logits="last")[0][:, 0])
        ids = [
            [answer_ids(model.tokenizer, prompt, text)[0] for text in (*pair.target, *pair.foil)]
            for pair, prompt in zip(used, prompts, strict=True)
        ]
        chosen = np.take_along_axis(logits, np.asarray(ids), 1)
        outcomes[side] = float((chosen[:, 0] - chosen[:, 1]).mean())
    return outcomes["source"] - outcomes["base"]
