"""From messages to token ids: chat templates, positions, answers in their context, packing, buckets of lengths.

Public as `jm.tokens`: `render` (one prompt, with the places of its parts), `batch` and `pad` (many prompts as one array).
"""

from jaxmed.tokens.answers import OTHERWISE, TokenizedExample, encode_example, tell_seams
from jaxmed.tokens.batch import batch, check_several, pad
from jaxmed.tokens.encode import has_text, show_tokens, text_ids
from jaxmed.tokens.ends import end_tokens
from jaxmed.tokens.limits import check_length, check_tokens
from jaxmed.tokens.packing import BUCKETS, WINDOW_BUCKETS, PackedPrompt, bucket, pack
from jaxmed.tokens.positions import BY_POSITION, WORDS, Patch, align, locate
from jaxmed.tokens.prompt import Prompt, answer_ids, prompt_ids, render, written_text
from jaxmed.tokens.template import DATE, need_tokenizer, render_chat

__all__ = [
    "BUCKETS",
    "BY_POSITION",
    "DATE",
    "OTHERWISE",
    "WINDOW_BUCKETS",
    "WORDS",
    "PackedPrompt",
    "Patch",
    "Prompt",
    "TokenizedExample",
    "align",
    "answer_ids",
    "batch",
    "bucket",
    "check_length",
    "check_several",
    "check_tokens",
    "encode_example",
    "end_tokens",
    "has_text",
    "locate",
    "need_tokenizer",
    "pack",
    "pad",
    "prompt_ids",
    "render",
    "render_chat",
    "show_tokens",
    "tell_seams",
    "text_ids",
    "written_text",
]
