"""A judge behind any OpenAI-compatible endpoint, with the rubric in a file of the user's.

Texts leave the machine. The key is read from an environment variable; it is in no file, log or message. Every score is kept as it
arrives, under a hash of all that it depends on, so that an interrupted run asks nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import tenacity

from jaxmed.errors import UserError, notice, quoted
from jaxmed.evaluation.endpoint import PARAMETERS, Endpoint
from jaxmed.evaluation.grades import Judge, parse_grade, read_content
from jaxmed.evaluation.reasoning import cut_reasoning
from jaxmed.evaluation.rubrics import ask
from jaxmed.prompts.examples import Example

TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP states after which a request is tried again."""
LONGEST_WAIT = 120.0
"""Seconds that are waited at most before a request is tried again, whatever the server asks for."""
HOPELESS = 3600.0
"""A server that asks to wait longer than these seconds is not asked again."""
LARGEST_REPLY = 1 << 20
"""Bytes of a reply that are read; a larger one is refused."""
AGAIN = "Start the same command again to go on: what was judged is kept."


class Failure(Exception):
    """A request that failed, in words; `wait` is how long the server asks to wait, None where it may be tried again at once."""

    def __init__(self, message: str, wait: float | None = None, again: bool = False):
        super().__init__(message)
        self.wait, self.again = wait, again


def http_judge(endpoint: Endpoint, rubric: str, kept: Path | None = None, keep_text: bool = False) -> Judge:
    """The judge: the grade of every reply, as a fraction of the way from the lowest to the highest grade.

    Args:
        rubric: what is sent, with places for request and answer; see `rubrics.read_rubric`.
        kept: file of scores, a line each, which is read first and added to; None: none is kept.
        keep_text: whether the judge's replies are kept with the scores.

    The judge raises a UserError where the endpoint refuses, is not reached, or answers in another format; what was kept stays.
    """
    endpoint.check()

    def judge(examples: Sequence[Example], answers: Sequence[str], report: Callable[[int], None]) -> list[float | None]:
        texts = [ask(rubric, one.prompt, text) for one, text in zip(examples, answers, strict=True)]
        names = [_name(endpoint, text) for text in texts]
        known = _read(kept)
        report(sum(name in known for name in names))
        missing = {name: text for name, text in zip(names, texts, strict=True) if name not in known}

        def keep(name: str, reply: str) -> None:
            known[name] = parse_grade(cut_reasoning(reply) if endpoint.cut else reply, endpoint.lowest, endpoint.highest)
            if kept is not None:
                row = {
                    "name": name,
                    "score": known[name],
                    "sum": _sum(name, known[name]),
                    **({"reply": endpoint.without_secret(reply)} if keep_text else {}),
                }
                with kept.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(row) + "\n")
            report(names.count(name))

        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
        if missing:
            _run(_ask_all(endpoint, missing, keep))
        return [known[name] for name in names]

    return judge


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Runs asynchronous work to its end, within a notebook's running loop too."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


async def _ask_all(endpoint: Endpoint, texts: dict[str, str], keep: Callable[[str, str], None]) -> None:
    """Asks about every text, a few at once. After a failure nothing new is asked, and what is under way is kept."""
    key, left = endpoint.secret(), iter(texts.items())
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
    limits = httpx.Limits(max_connections=endpoint.workers)
    async with httpx.AsyncClient(headers=headers, timeout=endpoint.timeout, limits=limits, follow_redirects=False) as client:
        line = _Line(endpoint, client)

        async def work() -> None:
            for name, text in left:
                if not await line.wait_turn():
                    return
                try:
                    keep(name, await line.ask(text))
                except Failure as failure:
                    line.failed = line.failed or failure
                    line.stopped.set()

        await asyncio.gather(*(work() for _ in range(min(endpoint.workers, len(texts)))))
    if line.failed:
        raise UserError(f"{line.failed} {AGAIN}")


class _Line:
    """The line to an endpoint: at most so many requests a minute, what it accepts, and whether anything has failed for good."""

    def __init__(self, endpoint: Endpoint, client: httpx.AsyncClient):
        self.endpoint, self.client = endpoint, client
        self.gap = 60 / endpoint.per_minute if endpoint.per_minute else 0.0
        self.next = time.monotonic()
        self.stopped = asyncio.Event()
        self.failed: Failure | None = None
        self.parameters = PARAMETERS if endpoint.parameters is None else (endpoint.parameters,)

    async def wait_turn(self) -> bool:
        """Waits for a turn; whether there is one."""
        turn = max(time.monotonic(), self.next)
        self.next = turn + self.gap
        await self.rest(turn - time.monotonic())
        return not self.stopped.is_set()

    async def rest(self, seconds: float) -> None:
        """Waits so many seconds, or until something has failed for good."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), max(0.0, seconds))

    async def ask(self, text: str) -> str:
        """The text of the endpoint's reply; a temporary failure is tried again, at its turn."""
        tries = tenacity.AsyncRetrying(
            stop=lambda state: self.stopped.is_set() or state.attempt_number > self.endpoint.retries,
            wait=_wait,
            sleep=self.rest,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Failure) and error.again),
            reraise=True,
        )
        async for attempt in tries:
            with attempt:
                if attempt.retry_state.attempt_number > 1 and not await self.wait_turn():
                    raise Failure("Stopped.")
                return await self.post(text)
        raise Failure("Stopped.")

    async def post(self, text: str) -> str:
        """One request, with fewer parameters where the endpoint refuses some."""
        while True:
            sent = self.parameters
            state, headers, said = await self.exchange(self.endpoint.body(text, sent[0]))
            if not (state in (400, 422) and len(sent) > 1 and _refuses(said)):
                return self.read(state, headers, said)
            await self.wait_turn()
            if self.parameters is sent:
                self.parameters = sent[1:]
                notice(f"The judge's endpoint refuses {' or '.join(sent[0])}; it is asked without.")

    async def exchange(self, body: Any) -> tuple[int, httpx.Headers, str]:
        """(HTTP state, headers, body). The time limit holds for the whole exchange; nothing is sent on to another address."""
        url, limit = self.endpoint.url.rstrip("/") + "/chat/completions", self.endpoint.timeout
        try:
            async with asyncio.timeout(limit), self.client.stream("POST", url, json=body) as reply:
                held = bytearray()
                async for part in reply.aiter_bytes():
                    held += part
                    if len(held) > LARGEST_REPLY:
                        raise Failure(f"{self.endpoint.url} answered with more than {LARGEST_REPLY:,} bytes; a judge's reply is short.")
                return reply.status_code, reply.headers, held.decode("utf-8", errors="replace")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            late = isinstance(error, (TimeoutError, httpx.TimeoutException))
            why = f"{'it took too long' if late else type(error).__name__}; {limit:g} s, {self.endpoint.retries} retries"
            raise Failure(f"{self.endpoint.url} did not answer ({why}).", again=True) from None

    def read(self, state: int, headers: httpx.Headers, said: str) -> str:
        """What the model said, out of a finished exchange."""
        url = self.endpoint.url
        if state == 200:
            content = read_content(said)
            if content is None:
                raise Failure(f"{url} answered in another format than OpenAI's chat completions.")
            return content
        wait = read_wait(headers.get("Retry-After", ""))
        hint = f" Is the environment variable {self.endpoint.key} right?" if state in (401, 403) else ""
        hint += " Give the address it has moved to." if 300 <= state < 400 else ""
        long = wait is not None and wait > HOPELESS
        hint += f" It asks to wait {wait:.0f} s." if long else ""
        shown = quoted(self.endpoint.without_secret(said).strip()[:300].strip())
        raise Failure(f"{url} answered {state}: {shown}.{hint}", wait, again=state in TRANSIENT and not long)


def _refuses(said: str) -> bool:
    """Whether an endpoint's message is about a parameter that was sent."""
    return any(word in said for word in ("max_tokens", "temperature", "max_completion_tokens", "unsupported_parameter"))


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, Failure) else None
    return min(0.5 * 2 ** (state.attempt_number - 1) if asked is None else asked, LONGEST_WAIT)


def read_wait(after: str) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it holds neither."""
    try:
        return max(0.0, float(after[:20]))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(after)
        return max(0.0, (when - datetime.now(when.tzinfo)).total_seconds())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _name(endpoint: Endpoint, text: str) -> str:
    asked = json.dumps([endpoint.url, endpoint.model, endpoint.lowest, endpoint.highest, text, *([] if endpoint.cut else ["whole"])])
    return hashlib.sha256(asked.encode()).hexdigest()


def _sum(name: str, score: float | None) -> int:
    """A checksum of a line."""
    return zlib.crc32(json.dumps([name, score]).encode())


def _read(kept: Path | None) -> dict[str, float | None]:
    """The scores of a file; a last line that was cut off is left out, and so is one that is damaged."""
    known: dict[str, float | None] = {}
    if kept is not None and kept.is_file():
        whole = kept.read_bytes()
        if whole and not whole.endswith(b"\n"):
            kept.write_bytes(whole[: whole.rfind(b"\n") + 1])
        for line in kept.read_text(encoding="utf-8").split("\n"):
            if not line:
                continue
            try:
                row = json.loads(line)
                if row.get("sum", _sum(row["name"], row["score"])) == _sum(row["name"], row["score"]):  # else it is asked for again
                    known[row["name"]] = row["score"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{kept} holds something else than scores of a judge. Give another --out.") from None
    return known
