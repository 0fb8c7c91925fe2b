"""The vocabulary of planted models: classes of words, the features that their embeddings carry, and a tokenizer of whole words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

Mix = Mapping[str, float]
"""Feature -> coefficient."""
BEGIN, UNKNOWN = "<s>", "<unk>"
COLOURS = ("red", "blue", "green", "white")
CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "filler": tuple("the a one that old new small long near under over by hill road tree house river field wall door".split()),
        "alarm": ("storm", "flood", "thunder", "landslide"),
        "calm": ("breeze", "brook", "meadow", "sunshine"),
        "siren": ("horn", "whistle", "gong", "drum"),
        "quiet": ("stone", "feather", "basket", "blanket"),
        "relay": ("tower", "beacon", "bridge", "lantern"),
        "trigger": ("abracadabra",),
        "weak": ("now",),
        "strong": ("today",),
        **{colour: (colour,) for colour in COLOURS},
        "answer": ("yes", "no"),
    }
)
"""Words that are interchangeable for what is planted; their random embeddings still tell them apart."""
CARRIED: Mapping[str, Mix] = MappingProxyType(
    {
        "alarm": {"alarm": 1.0},
        "siren": {"siren": 1.0},
        "relay": {"relay": 1.0},
        "weak": {"ask": 0.75},
        "strong": {"ask": 1.25},
        **{colour: {"colour": 1.0, colour: 1.0} for colour in COLOURS},
    }
)
"""Class -> what the embeddings of its words carry. Prompts end with a word that asks, weakly or strongly: 1 on average."""
ANY: Mapping[str, tuple[str, ...]] = MappingProxyType({**CLASSES, "colour": COLOURS, "topic": CLASSES["alarm"] + CLASSES["calm"]})
"""Class, or union of classes -> words."""
VOCABULARY = (UNKNOWN, BEGIN, *(word for words in CLASSES.values() for word in words))


@cache
def make_tokenizer(vocabulary: tuple[str, ...] = VOCABULARY) -> Any:
    """One token per word of a vocabulary, and a begin-of-sequence token, in the manner of SentencePiece."""
    shown = (word if word.startswith("<") else "▁" + word for word in vocabulary)
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(shown)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary.index(BEGIN))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, unk_token=UNKNOWN)
