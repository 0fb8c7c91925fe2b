"""Tiny tokenizers of every kind, trained on a few lines, and chat templates in the manner of published families."""
# ruff: noqa: E501 - templates are long lines

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "Sure, here is how to bake a loaf of bread.",
    "Sure! The sky is blue since air scatters short waves.",
    "I cannot say why. No, I am sorry.",
    "user assistant system model User: Assistant: hi there, how are you?",
    "[INST] hi [/INST] Sure <|user|>\nhi\n<|assistant|>\nSure",
    "Who is it? It is the assistant.\n\nName a colour. Blue.",
]
SIGNS = (
    "<unk> <s> </s> <|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> <|end_header_id|> <start_of_turn> <end_of_turn> <|end|>"
    " <|user|> <|assistant|> <|system|> <|start_of_role|> <|end_of_role|> <|turn|> <|turn_end|> <|bot|> <|human|>"
).split()
"""Control tokens; the first three are unknown, begin and end."""


def _byte_level() -> tuple[Tokenizer, Any]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend, trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)


def _sentencepiece_bpe() -> tuple[Tokenizer, Any]:
    """As Llama 2: a space before every text and after every control token, no pre-tokenizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend, trainers.BpeTrainer(vocab_size=300, show_progress=False)


def _sentencepiece_first() -> tuple[Tokenizer, Any]:
    """As newer files: a space before the first word alone."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return backend, trainers.BpeTrainer(vocab_size=300, show_progress=False)


def _unigram() -> tuple[Tokenizer, Any]:
    """Every sign and every word, the longer the likelier; so few lines teach the trainer no words."""
    words = {piece for line in LINES for word in re.findall(r"[A-Za-z]+|\S|\n", line) for piece in (word, "▁" + word)}
    signs = {sign for line in LINES for sign in line.replace(" ", "▁")}
    scores = [("<unk>", 0.0), *((piece, -9.0 - 1 / len(piece)) for piece in sorted(words | signs))]
    backend = Tokenizer(models.Unigram(scores, 0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return backend, None


def _wordpiece() -> tuple[Tokenizer, Any]:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(vocab_size=300, show_progress=False)


KINDS: dict[str, Callable[[], tuple[Tokenizer, Any]]] = {
    "byte-level BPE": _byte_level,
    "SentencePiece BPE": _sentencepiece_bpe,
    "SentencePiece BPE, first word": _sentencepiece_first,
    "SentencePiece unigram": _unigram,
    "WordPiece": _wordpiece,
}

ROLES = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + END + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
SYSTEM_FIRST = (
    "{% set ns = namespace(text='') %}{% if messages[0].role == 'system' %}{% set ns.text = messages[0].content + '\n\n' %}{% endif %}"
)
TEMPLATES: dict[str, str] = {
    "ChatML": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "Llama 2": SYSTEM_FIRST + "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (ns.text if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "Llama 3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "Gemma": "{{ bos_token }}" + SYSTEM_FIRST + "{% for m in messages if m.role != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (ns.text if loop.first else '') + (m.content | trim) + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "Mistral v1": "{{ bos_token }}" + SYSTEM_FIRST + "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (ns.text if loop.first else '') + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}",
    "Mistral v3": "{{ bos_token }}" + SYSTEM_FIRST + "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (ns.text if loop.last else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "Phi 3": ROLES.replace("END", "'<|end|>'"),
    "Zephyr": ROLES.replace("END", "eos_token"),
    "Command R": "{{ bos_token }}{% for m in messages %}{{ '<|turn|>' + {'user': '<|human|>', 'assistant': '<|bot|>'}.get(m.role, '<|system|>') + "
    "m.content.strip() + '<|turn_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|><|bot|>' }}{% endif %}",
    "Tulu": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' else '') + "
    "('' if loop.last and m.role == 'assistant' else '\n') }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    "{% endfor %}",
    "Granite": "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
    "DeepSeek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'system' %}"
    "{{ m.content + '\n\n' }}{% else %}{{ 'Assistant: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "Vicuna": "{% for m in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(m.role, '') + m.content + "
    "(eos_token if m.role == 'assistant' else ' ') }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
    "Falcon": "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ m.role.capitalize() + ': ' + m.content.replace('\n\n', '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}",
}


@cache
def _trained(kind: str) -> str:
    backend, trainer = KINDS[kind]()
    signs = [AddedToken(sign, special=True, normalized=False) for sign in SIGNS]
    used = backend.pre_tokenizer
    if kind.startswith("SentencePiece BPE"):  # SentencePiece learns within words, and applies what it learned to whole texts
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    if trainer is not None:
        trainer.special_tokens = signs
        backend.train_from_iterator(LINES, trainer)
    backend.add_special_tokens(signs)
    backend.pre_tokenizer = used
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return backend.to_str()


def tokenizer(kind: str, template: str) -> Any:
    """A tokenizer of a kind of `KINDS` with a template of `TEMPLATES`, or a template itself."""
    known = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATES.get(template, template)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained(kind)), **known)
