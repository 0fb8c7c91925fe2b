"""Checkpoints that hold a supported text model inside something else: vision models, compiled or parallel modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxmed.errors import UserError, all_problems
from jaxmed.models.checkpoints import Checkpoint

WITHIN, BEFORE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."), "module."
"""What `torch.compile`, sharding and checkpointing put into names, and what `DataParallel` and its kin put before them."""


@dataclass(frozen=True)
class Wrapper:
    """A model type whose text part is a model of a supported type.

    Attributes:
        text: the key of the text part's config; where a config lacks it, its own keys are the text part's.
        kinds: model type in that config -> the family that runs it.
        defaults: what such configs leave out.
        left_out: keys beside the text part's that are not the text model's.
    """

    text: str
    kinds: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()


IMAGE_KEYS = frozenset("vision_config text_config image_token_id video_token_id vision_start_token_id vision_end_token_id".split()) | {
    "vision_token_id"
}
GEMMA3 = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
}
QWEN = {
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152_064,
    "max_position_embeddings": 32_768,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": {**LLAMA, "intermediate_size": 22_016, "num_key_value_heads": 32, "vocab_size": 151_936, "max_position_embeddings": 32_768},
    "gemma3_text": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
}
"""Type of an inner config -> the values that `transformers` leaves out when it writes one, because its own defaults say them."""

WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper("text_config", {"gemma3_text": "gemma3_text"}, GEMMA3),
    "mistral3": Wrapper("text_config", {"mistral": "mistral"}, {"tie_word_embeddings": False}),
    "llava": Wrapper("text_config", {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2"}),
    "llava_next": Wrapper("text_config", {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2"}),
    "qwen2_vl": Wrapper("text_config", {"qwen2_vl": "qwen2", "qwen2_vl_text": "qwen2"}, QWEN, IMAGE_KEYS),
    "qwen2_5_vl": Wrapper("text_config", {"qwen2_5_vl": "qwen2", "qwen2_5_vl_text": "qwen2"}, QWEN, IMAGE_KEYS),
    "llama4": Wrapper("text_config", {}),
}
"""By the outer `model_type`. Positions of Qwen's images have three axes; those of text are equal on all, so the rotation is plain."""
OF_IMAGES = ("vision_tower.", "vision_model.", "multi_modal_projector.", "visual.", "model.vision_tower.", "model.multi_modal_projector.")
OF_IMAGES += ("model.visual.", "model.vision_model.")
INSIDE = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.lm_head.", "lm_head."))
"""What text tensors are called inside a wrapper, and alone."""


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The text model of a checkpoint, under the names it has alone; the same checkpoint where there is nothing to take off.

    Raises:
        UserError: a text part that is not supported, or two tensors of one name.
    """
    checkpoint = _without_prefixes(checkpoint)
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return checkpoint
    config = text_config(checkpoint.config, WRAPPERS[kind])
    return _renamed(replace(checkpoint, config=config), _text_names(checkpoint.shapes))


def text_config(raw: Mapping[str, Any], wrapper: Wrapper) -> dict[str, Any]:
    """The config of the text part."""
    inner = raw.get(wrapper.text, {})
    if not isinstance(inner, Mapping):
        raise UserError(f"{wrapper.text} of this {raw['model_type']} config is a {type(inner).__name__}; an object is expected.")
    outside = {"model_type", "architectures"} | wrapper.left_out
    flat = {} if inner else {key: value for key, value in raw.items() if key not in outside}
    given = {**{key: raw[key] for key in ("tie_word_embeddings",) if key in raw}, **inner} if inner else flat
    named = str(given.get("model_type", raw["model_type"] if not inner else next(iter(wrapper.kinds), "")))
    if named not in wrapper.kinds:
        known = f"text parts of type {', '.join(wrapper.kinds)}" if wrapper.kinds else "no text part of it"
        raise UserError(f"This {raw['model_type']} checkpoint holds a text model of type {named!r}; this version runs {known}.")
    ends = {key: raw[key] for key in ("eos_token_id",) if raw.get(key) is not None}  # the outer ones count, as in transformers
    found = {**(LEFT_OUT.get(named, {}) if inner else {}), **wrapper.defaults, **given, **ends, "model_type": wrapper.kinds[named]}
    for key in ("rope_scaling", "rope_parameters"):
        rope = found.get(key)
        if isinstance(rope, Mapping) and "mrope_section" in rope:
            rest = {name: value for name, value in rope.items() if name not in ("mrope_section", "type", "rope_type")}
            found[key] = {**rest, "rope_type": "default"} if rest else None
    return found


def _text_names(names: Iterable[str]) -> dict[str, str]:
    """Name in a wrapper -> name alone, of the text part's tensors."""
    found = {name: name for name in names if not name.startswith(OF_IMAGES)}
    for inside, alone in INSIDE:
        found = {name: alone + new.removeprefix(inside) if new.startswith(inside) else new for name, new in found.items()}
    return found


def _without_prefixes(checkpoint: Checkpoint) -> Checkpoint:
    names, taken = {}, set()
    for name in checkpoint.shapes:
        new = name
        for part in WITHIN:
            taken |= {part} if part in new else set()
            new = new.replace(part, "")
        while new.startswith(BEFORE):
            new, taken = new.removeprefix(BEFORE), taken | {BEFORE}
        names[name] = new
    if str(checkpoint.config.get("model_type")) not in WRAPPERS and any(
        new.startswith(inside) for new in names.values() for inside, _ in INSIDE
    ):
        alone = _text_names(names.values())
        names, taken = {name: alone[new] for name, new in names.items() if new in alone}, taken | {"language_model."}
    if not taken:
        return checkpoint
    print(f"Names of tensors in {checkpoint.files[0].name} contain {' and '.join(sorted(taken))}, which is left out.", file=sys.stderr)
    return _renamed(checkpoint, names)


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with the tensors of `names` under their new names, and no others."""
    old = {new: name for name, new in names.items()}
    twice = [f"tensor {new} is there as {name} and as {old[new]}" for name, new in names.items() if old[new] != name]
    if twice:
        raise all_problems(f"Checkpoint {checkpoint.files[0]}", twice, "Keep one of each.")
    shapes = {new: checkpoint.shapes[name] for new, name in old.items()}
    unreadable = {new: checkpoint.unreadable[name] for new, name in old.items() if name in checkpoint.unreadable}
    return replace(checkpoint, shapes=shapes, unreadable=unreadable, read=lambda name, cut=None: checkpoint.read(old[name], cut))
