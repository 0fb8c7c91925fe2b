"""A judge behind any OpenAI-compatible endpoint, with the rubric in a file of the user's.

Texts leave the machine. The key is read from an environment variable; it is in no file, log or message. Every score is kept as it
arrives, under a hash of all that it depends on, so that an interrupted run asks nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

from jaxmed.errors import UserError
from jaxmed.evaluation.judges import Judge, fill
from jaxmed.prompts.examples import Example

PASSING = (0, 408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP states after which a request is tried again; 0: no answer."""
LONGEST_WAIT = 120.0
"""Seconds that a server may ask to wait before a request is tried again."""
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")
_NAMED = re.compile(r"(?:grade|score|rating)\W{1,4}(?:is\W{1,3})?(-?(?:\d+\.?\d*|\.\d+))(?![-\d])", re.IGNORECASE)


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: base address, to which /chat/completions is added, such as http://localhost:8000/v1.
        model: name of the model there.
        key: environment variable that holds the key; empty or unset: no key is sent.
        lowest, highest: grades of the rubric, which become 0 and 1.
        per_minute: requests a minute at most, repeated ones included; 0: no limit.
        timeout: seconds without an answer after which a request has failed.
        retries: further tries of a request that failed in passing; waits double from half a second, or are what the server asks for, up to
            `LONGEST_WAIT`.
        workers: requests at once.
        tokens: of a reply at most.
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

    def check(self) -> None:
        """Raises a UserError for values that cannot be used."""
        try:
            parts = urlsplit(self.url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"The endpoint {self.url!r} is no address such as https://host/v1.")
        if parts.username or parts.password or parts.query:
            raise UserError("The endpoint's address holds a key or password. Put the key into an environment variable and name that.")
        if not self.model:
            raise UserError("Name the model to ask at the endpoint.")
        if not self.lowest < self.highest:
            raise UserError(f"The lowest grade ({self.lowest:g}) is below the highest ({self.highest:g}).")
        if self.per_minute < 0 or self.timeout <= 0 or self.retries < 0 or self.workers < 1 or self.tokens < 1:
            raise UserError("Requests a minute and retries are not negative, the time-out is above 0; workers and tokens are at least 1.")
        self.secret()

    def secret(self) -> str:
        """The key, or an empty text. A UserError, which does not show it, where it cannot be sent."""
        key = os.environ.get(self.key, "").strip() if self.key else ""
        if not key.isascii() or not key.isprintable():
            raise UserError(f"The environment variable {self.key} holds characters that no key has (line ends or accents).")
        return key

    @property
    def warning(self) -> str:
        """What the user is told before anything is sent."""
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        plain = self.url.startswith("http:") and not local and bool(self.secret())
        where = "another process of this machine" if local else "this machine: they are sent"
        return f"requests and answers leave {where} to {self.url}" + "; the key is sent unencrypted" * plain


def http_judge(endpoint: Endpoint, rubric: str, kept: Path | None = None, keep_text: bool = False) -> Judge:
    """The judge: the first number of every reply, as a share of the way from the lowest to the highest grade.

    Args:
        rubric: what is sent, with places for request and answer; see `judges.read_rubric`.
        kept: file of scores, a line each, which is read first and added to; None: none is kept.
        keep_text: whether the judge's replies are kept with the scores.

    The judge raises a UserError where the endpoint refuses, is not reached, or answers in another format; what was kept stays.
    """
    endpoint.check()

    def judge(examples: Sequence[Example], answers: Sequence[str], report: Callable[[int], None]) -> list[float | None]:
        asked = [fill(rubric, one.prompt, text) for one, text in zip(examples, answers, strict=True)]
        names = [_name(endpoint, text) for text in asked]
        known = _read(kept)
        report(sum(name in known for name in names))
        missing = {name: text for name, text in zip(names, asked, strict=True) if name not in known}
        lock, pace, session = threading.Lock(), _Pace(endpoint.per_minute), _session(endpoint)

        failures: list[UserError] = []

        def ask(name: str, text: str) -> None:
            if not pace.wait():
                return
            try:
                reply = _ask(session, endpoint, text, pace)
            except UserError as error:
                pace.stop()
                failures.append(error)
                return
            score = parse_grade(reply, endpoint.lowest, endpoint.highest)
            with lock:
                known[name] = score
                if kept is not None:
                    with kept.open("a", encoding="utf-8") as handle:
                        handle.write(json.dumps({"name": name, "score": score, **({"reply": reply} if keep_text else {})}) + "\n")
                report(names.count(name))

        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(endpoint.workers) as pool:
            try:
                list(pool.map(ask, missing, missing.values()))
            finally:
                pace.stop()  # what has not begun when the user interrupts is not asked
        if failures:
            raise failures[0]
        return [known[name] for name in names]

    return judge


def parse_grade(reply: str, lowest: float, highest: float) -> float | None:
    """The grade of a reply as 0 .. 1: what follows the word grade, score or rating, or else its only number.

    None where there is no such number, where there are several, and where it is no grade.
    """
    named, numbers = _NAMED.findall(reply), set(_NUMBER.findall(reply))
    found = named[-1] if named else numbers.pop() if len(numbers) == 1 else None
    if found is None or not lowest <= float(found) <= highest:
        return None
    return (float(found) - lowest) / (highest - lowest)


class _Pace:
    """Lets requests through at most so often; none once stopped."""

    def __init__(self, per_minute: float):
        self.gap = 60 / per_minute if per_minute else 0.0
        self.next = time.monotonic()
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def wait(self) -> bool:
        """Waits for a turn; whether there is one."""
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + self.gap
        return not self.stopped.wait(max(0.0, turn - now))

    def rest(self, seconds: float) -> bool:
        """Waits; whether one may go on."""
        return not self.stopped.wait(seconds)

    def stop(self) -> None:
        self.stopped.set()


class _Key(AuthBase):
    """Sends the key, and nothing that the machine's .netrc may hold."""

    def __init__(self, key: str):
        self.key = key

    def __call__(self, request: Any) -> Any:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def _session(endpoint: Endpoint) -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=endpoint.workers))
    return session


def _ask(session: requests.Session, endpoint: Endpoint, text: str, pace: _Pace) -> str:
    """The text of the endpoint's reply; what fails in passing is tried again, at its turn."""
    key = endpoint.secret()
    for tried in range(endpoint.retries + 1):
        if tried and not pace.wait():
            break
        state, said, after = _post(session, endpoint, text, key)
        if state == 200:
            return _content(endpoint, said)
        if state not in PASSING or tried == endpoint.retries or not pace.rest(min(after or 0.5 * 2**tried, LONGEST_WAIT)):
            break
    if state == NO_ANSWER:
        raise UserError(f"{endpoint.url} did not answer ({said}; {endpoint.timeout:g} s, {endpoint.retries} retries). {AGAIN}")
    hint = f" Is the environment variable {endpoint.key} right?" if state in (401, 403) else ""
    shown = (said.replace(key, "***") if key else said)[:300].strip()
    raise UserError(f"{endpoint.url} answered {state}: {shown!r}.{hint} {AGAIN}")


NO_ANSWER = 0
"""In place of an HTTP state."""
AGAIN = "Start the same command again to go on: what was judged is kept."


def _post(session: requests.Session, endpoint: Endpoint, text: str, key: str) -> tuple[int, str, float | None]:
    """(HTTP state, body, seconds the server asks to wait). Nothing is sent on to another address."""
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": endpoint.tokens}
    url = endpoint.url.rstrip("/") + "/chat/completions"
    try:
        reply = session.post(url, json=body, auth=_Key(key), timeout=endpoint.timeout, allow_redirects=False)
        after = reply.headers.get("Retry-After", "")
        return reply.status_code, reply.text, float(after) if after.replace(".", "", 1).isdigit() else None
    except (requests.RequestException, ValueError) as error:
        return NO_ANSWER, "it took too long" if isinstance(error, requests.Timeout) else type(error).__name__, None


def _content(endpoint: Endpoint, body: str) -> str:
    """What the model at the endpoint said."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        content = 0
    if content is not None and not isinstance(content, str):
        raise UserError(f"{endpoint.url} answered in another format than OpenAI's chat completions.")
    return content or ""


def _name(endpoint: Endpoint, text: str) -> str:
    asked = json.dumps([endpoint.url, endpoint.model, endpoint.lowest, endpoint.highest, text])
    return hashlib.sha256(asked.encode()).hexdigest()


def _read(kept: Path | None) -> dict[str, float | None]:
    """The scores of a file; a last line that was cut off is left out."""
    known: dict[str, float | None] = {}
    if kept is not None and kept.is_file():
        whole = kept.read_bytes()
        if whole and not whole.endswith(b"\n"):
            kept.write_bytes(whole[: whole.rfind(b"\n") + 1])
        for line in kept.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                known[row["name"]] = row["score"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{kept} holds something else than scores of a judge. Give another --out.") from None
    return known
