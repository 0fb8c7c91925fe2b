"""An OpenAI-compatible endpoint: where and how it is asked, and what of it may be shown."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import unescape
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from jaxmed.errors import UserError, all_problems, quoted, unknown

PARAMETERS: tuple[tuple[str, ...], ...] = (("max_tokens", "temperature"), ("max_completion_tokens",), ())
"""What is sent beside the text. The next row is taken where an endpoint refuses a parameter, as newer models do."""
LEGAL = ("max_tokens", "max_completion_tokens", "temperature")


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: base address, to which /chat/completions is added, such as http://localhost:8000/v1.
        model: name of the model there.
        key: environment variable that holds the key; empty or unset: no key is sent.
        lowest, highest: grades of the rubric, which become 0 and 1.
        per_minute: requests a minute at most, repeated ones included; 0: no limit.
        timeout: seconds for one whole request, its answer included, after which it has failed.
        retries: further tries of a request after a temporary failure; waits double from half a second, or are what the server asks for, up
            to `http_judge.LONGEST_WAIT`.
        workers: requests at once.
        tokens: of a reply at most.
        parameters: which of `LEGAL` are sent; None: the first row of `PARAMETERS` that the endpoint accepts.
        cut: whether reasoning is cut off replies before their grade is read.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    lowest: float = 1.0
    highest: float = 5.0
    per_minute: float = 0.0
    timeout: float = 60.0
    retries: int = 5
    workers: int = 4
    tokens: int = 64
    parameters: tuple[str, ...] | None = None
    cut: bool = True

    def check(self) -> None:
        """Raises a UserError for values that cannot be used."""
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            raise UserError(f"The endpoint {quoted(self.url)} is no address such as https://host/v1.") from None
        if parts.username or parts.password or parts.query:
            raise UserError("The endpoint's address holds a key or password. Put the key into an environment variable and name that.")
        if not known:
            raise UserError(f"The endpoint {quoted(self.url)} is no address such as https://host/v1.")
        numbers = (self.per_minute >= 0, self.timeout > 0, self.retries >= 0, self.workers >= 1, self.tokens >= 1)
        legal = {
            "Name the model to ask at the endpoint.": bool(self.model),
            f"The lowest grade ({self.lowest:g}) is below the highest ({self.highest:g}).": self.lowest < self.highest,
            "Requests a minute and retries are not negative, the time-out is above 0; workers and tokens are at least 1.": all(numbers),
        }
        if problems := [problem for problem, holds in legal.items() if not holds]:
            raise all_problems("The endpoint's settings", problems)
        for name in self.parameters or ():
            if name not in LEGAL:
                raise unknown("parameter of an endpoint", name, LEGAL)
        self.secret()

    def secret(self) -> str:
        """The key, or an empty text. A UserError, which does not show it, where it cannot be sent."""
        key = os.environ.get(self.key, "").strip() if self.key else ""
        if not key.isascii() or not key.isprintable():
            raise UserError(f"The environment variable {self.key} holds characters that no key has (line ends or accents).")
        return key

    def without_secret(self, text: str) -> str:
        """A text in which the key is hidden; where it is written in some code, nothing of the text is left."""
        key = self.secret()
        written = sorted({key, quote(key), quote(key, safe=""), key.replace("/", "\\/")} - {""}, key=len, reverse=True)
        if not written:
            return text
        text = re.sub("|".join(map(re.escape, written)), "***", text, flags=re.IGNORECASE)
        read = " ".join((text, unquote(text), unescape(text), _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)))
        held = (_signs(key), _signs(key[::-1]), *_base64(key))
        return "(a text that holds the key in some code)" if any(len(form) >= SHORTEST and form in _signs(read) for form in held) else text

    @property
    def warning(self) -> str:
        """What the user is told before anything is sent."""
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        plain = urlsplit(self.url).scheme == "http" and not local and bool(self.secret())
        where = "another process of this machine" if local else "this machine: they are sent"
        return f"requests and answers leave {where} to {self.url}" + "; the key is sent unencrypted" * plain

    def body(self, text: str, parameters: tuple[str, ...]) -> Mapping[str, Any]:
        """What is sent to have a text answered."""
        values = {"max_tokens": self.tokens, "max_completion_tokens": self.tokens, "temperature": 0}
        return {"model": self.model, "messages": [{"role": "user", "content": text}], **{name: values[name] for name in parameters}}


SHORTEST = 8
"""Letters and digits of a key, from which on it is looked for in codes: shorter ones are found in any text."""
_ESCAPED = re.compile(r"\\(?:u|x)(?:00)?([0-9a-fA-F]{2})")


def _signs(text: str) -> str:
    """Letters and digits alone, so that no separators, line ends or NUL bytes between them matter."""
    return "".join(sign for sign in text.casefold() if sign.isascii() and sign.isalnum())


def _base64(key: str) -> Iterator[str]:
    """What is the same in every Base64 text that holds a key, by the place where the key begins."""
    for skipped in range(3):
        coded = b64encode(b"\0" * skipped + key.encode()).decode()
        yield _signs(coded[(0, 2, 3)[skipped] : len(coded) // 4 * 4 - 4])
