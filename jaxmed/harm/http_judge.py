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
from urllib3.util import Retry

from jaxmed.errors import UserError
from jaxmed.harm.judges import Judge, fill
from jaxmed.prompts.examples import Example

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP states after which a request is tried again."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: base address, to which /chat/completions is added, such as http://localhost:8000/v1.
        model: name of the model there.
        key: environment variable that holds the key; empty or unset: no key is sent.
        lowest, highest: grades of the rubric, which become 0 and 1.
        per_minute: requests a minute at most; 0: no limit.
        timeout: seconds without an answer after which a request has failed.
        retries: further tries of a request that failed in passing; waits double from one second, or are what the server asks for.
        workers: requests at once.
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

    def check(self) -> None:
        """Raises a UserError for values that cannot be used."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"The endpoint {self.url!r} is no address such as https://host/v1.")
        if parts.username or parts.password or parts.query:
            raise UserError("The endpoint's address holds a key or password. Put the key into an environment variable and name that.")
        if not self.model:
            raise UserError("Name the model to ask at the endpoint.")
        if not self.lowest < self.highest:
            raise UserError(f"The lowest grade ({self.lowest:g}) is below the highest ({self.highest:g}).")
        if self.per_minute < 0 or self.timeout <= 0 or self.retries < 0 or self.workers < 1:
            raise UserError("Requests a minute and retries are not negative, the time-out is above 0, and there is at least one worker.")

    @property
    def warning(self) -> str:
        """What the user is told before anything is sent."""
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        plain = self.url.startswith("http:") and not local and bool(os.environ.get(self.key))
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
                reply = _ask(session, endpoint, text)
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
    """The first number of a reply as 0 .. 1; None where there is none, or one that is no grade."""
    found = _NUMBER.search(reply)
    if found is None or not lowest <= float(found.group()) <= highest:
        return None
    return (float(found.group()) - lowest) / (highest - lowest)


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
    again = Retry(
        total=endpoint.retries,
        backoff_factor=0.5,
        status_forcelist=PASSING,
        allowed_methods=("POST",),
        respect_retry_after_header=True,
        raise_on_status=False,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=endpoint.workers))
    return session


def _ask(session: requests.Session, endpoint: Endpoint, text: str) -> str:
    """The text of the endpoint's reply."""
    key = os.environ.get(endpoint.key, "") if endpoint.key else ""
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 64}
    url = endpoint.url.rstrip("/") + "/chat/completions"
    try:
        reply = session.post(url, json=body, auth=_Key(key), timeout=endpoint.timeout)
    except requests.RequestException as error:
        why = "it took too long" if isinstance(error, requests.Timeout) or "timed out" in str(error) else type(error).__name__
        raise UserError(
            f"{endpoint.url} did not answer ({why}; {endpoint.timeout:g} s, {endpoint.retries} retries). Start the command again to go on."
        ) from None
    if reply.status_code != 200:
        hint = f" Is the environment variable {endpoint.key} right?" if reply.status_code in (401, 403) else ""
        said = reply.text[:300].replace(key, "***") if key else reply.text[:300]
        raise UserError(f"{endpoint.url} answered {reply.status_code}: {said.strip()!r}.{hint} Start the command again to go on.")
    try:
        content = reply.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{endpoint.url} answered in another format than OpenAI's chat completions.") from None
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
