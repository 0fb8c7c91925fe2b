"""Chats: what a message is, and what is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxmed.errors import LONGEST, UserError

Chat = Sequence[dict[str, str]]


def check_chat(chat: Any) -> None:
    """Refuses what is no list of roles with texts, with a UserError that shows why."""
    if not isinstance(chat, (list, tuple)):
        raise UserError(f"A chat is a list of messages, not {str(chat)[:LONGEST]}.")
    for message in chat:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or not isinstance(message.get("role"), str):
            raise UserError(f"A chat message is {{'role': ..., 'content': text}}, not {str(message)[:LONGEST]}. Give content as one text.")
