"""Buckets of lengths, and a prompt with its answers as branches of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BUCKETS = tuple(int(b) for b in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192))
WINDOW_BUCKETS = (1, 2, 4, 6, *BUCKETS)


def bucket(length: int, sizes: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `length`; beyond the last one, multiples of 4,096."""
    return next((size for size in sizes if size >= length), -(-length // 4096) * 4096)


@dataclass(frozen=True)
class PackedPrompt:
    """A prompt with its answer texts as branches, padded to a bucket: every answer sees the prompt and itself alone.

    Attributes:
        tokens: int [T]; prompt, then the answers' tokens (without each answer's last, which is only predicted), then padding.
        position: int [T], RoPE positions.
        visible: bool [T, T].
        prompt: number of prompt tokens.
        used: number of tokens that are not padding.
        readers: per answer, per answer token, the column whose logits predict it.
    """

    tokens: np.ndarray
    position: np.ndarray
    visible: np.ndarray
    prompt: int
    used: int
    readers: tuple[tuple[int, ...], ...]


def pack(prompt: np.ndarray, answers: Sequence[Sequence[int]], size: int | None = None) -> PackedPrompt:
    """Packs a prompt and its answers into one row of `size` columns (default: the bucket)."""
    count = len(prompt)
    used = count + sum(len(answer) - 1 for answer in answers)
    size = bucket(used) if size is None else size
    tokens, position = np.zeros(size, np.int32), np.zeros(size, np.int32)
    visible = np.eye(size, dtype=bool)
    tokens[:count], position[:count] = prompt, np.arange(count)
    visible[:count, :count] = np.tril(np.ones((count, count), bool))
    column, readers = count, []
    for answer in answers:
        fed = len(answer) - 1
        here = slice(column, column + fed)
        tokens[here], position[here] = answer[:-1], count + np.arange(fed)
        visible[here, :count] = True
        visible[here, here] = np.tril(np.ones((fed, fed), bool))
        readers.append((count - 1, *range(column, column + fed)))
        column += fed
    return PackedPrompt(tokens, position, visible, count, used, tuple(readers))
