"""An endpoint that fails in every way, on this machine: tries, waits, replies without end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluation import http_judge as asking
from jaxmed.evaluation.endpoint import Endpoint
from jaxmed.evaluation.http_judge import http_judge, read_wait
from tests.judge_server import ANSWERS, REQUESTS, RUBRIC, Server, endpoint, reply, serving, silent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local endpoint; the key is in the environment."""
    monkeypatch.setenv("A_KEY", "secret-key-1234")
    with serving() as one:
        yield one


def test_passing_failures_are_tried_again(server: Server) -> None:
    states = iter([429, 503, 200])

    def script(at: int, body: dict[str, Any]) -> Any:
        state = next(states)
        return reply("5") if state == 200 else (state, {"Retry-After": "0"}, "busy")

    server.script = script
    assert http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent) == [1.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("said", "message", "tries"),
    [
        ((500, {"Retry-After": "0"}, "down"), "answered 500", 3),
        ((401, {}, "the key secret-key-1234 is wrong"), r"401: 'the key \*\*\* is wrong'.*A_KEY right", 1),
        ((404, {}, "no such model"), "404: 'no such model'", 1),
        ((200, {}, "hello"), "another format", 1),
        ((200, {}, '{"choices": []}'), "another format", 1),
        ((200, {}, '{"choices": [{"message": {"content": [1]}}]}'), "another format", 1),
        (0.6, "took too long; 0.2 s", 3),
    ],
)
def test_lasting_failures_keep_what_there_is(server: Server, tmp_path: Path, said: Any, message: str, tries: int) -> None:
    kept = tmp_path / "scores.jsonl"
    server.script = lambda at, body: reply("2") if at == 0 else said
    judge = http_judge(endpoint(server, retries=2, timeout=0.2), RUBRIC, kept)
    with pytest.raises(UserError, match=message):
        judge(REQUESTS, ANSWERS, silent)
    assert len(server.asked) == 1 + tries
    assert len(kept.read_text().splitlines()) == 1
    assert "secret" not in kept.read_text()
    server.script = lambda at, body: reply("3")
    assert judge(REQUESTS, ANSWERS, silent) == [0.25, 0.5, 0.5]
    assert len(server.asked) == 3 + tries


def test_an_endpoint_that_is_not_there(server: Server) -> None:
    one = endpoint(server, retries=0)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="did not answer"):
        http_judge(one, RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)


def test_the_rate_is_limited(server: Server) -> None:
    server.script = lambda at, body: reply("3")
    http_judge(endpoint(server, per_minute=600, workers=4), RUBRIC)(REQUESTS, ANSWERS, silent)
    times = sorted(at for _, _, at in server.asked)
    assert min(np.diff(times)) > 0.05  # 0.1 s but for the threads' own delays
    server.asked.clear()
    server.script = lambda at, body: (503, {"Retry-After": "0"}, "busy")
    with pytest.raises(UserError, match="answered 503"):
        http_judge(endpoint(server, per_minute=600, retries=2), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    assert min(np.diff([at for _, _, at in server.asked])) > 0.05  # further tries wait for their turn too


def test_times_to_wait_are_seconds_or_dates() -> None:
    assert read_wait("3") == 3.0
    assert read_wait("0.5") == 0.5
    assert read_wait("-3") == 0.0
    assert read_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (read_wait("Fri, 01 Jan 2999 00:00:00 GMT") or 0) > 1e9
    assert (read_wait("9" * 400) or 0) > 1e18
    assert [read_wait(text) for text in ("", "soon", "Fri, 99 Foo", "1e")] == [None] * 4


def test_a_wait_of_years_is_not_waited_for(server: Server) -> None:
    server.script = lambda at, body: (503, {"Retry-After": "Fri, 01 Jan 2999 00:00:00 GMT"}, "later")
    with pytest.raises(UserError, match="asks to wait"):
        http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    assert len(server.asked) == 1


def test_waits_are_capped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "LONGEST_WAIT", 0.01)
    server.script = lambda at, body: reply("5") if at else (429, {"Retry-After": "3000"}, "busy")
    assert http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent) == [1.0]
    assert server.asked[1][2] - server.asked[0][2] < 30


class Drip:
    """A server that sends `first` and then a byte every few milliseconds for as long as somebody listens."""

    def __init__(self, first: bytes, size: int = 1):
        self.first, self.size, self.asked = first, size, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                taken, _ = self.socket.accept()
            except OSError:
                return
            self.asked += 1
            threading.Thread(target=self.send, args=(taken,), daemon=True).start()

    def send(self, taken: socket.socket) -> None:
        with taken:
            try:
                taken.sendall(self.first)
                while True:
                    taken.sendall(b"x" * self.size)
                    time.sleep(0.02 if self.size == 1 else 0)
            except OSError:
                return


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("first", [b"HT", OK + b"X-Slow: ", OK + b"Content-Length: 1000\r\n\r\n", OK + b"\r\n"])
def test_a_reply_that_drips_is_given_up(first: bytes) -> None:
    drip = Drip(first)
    with pytest.raises(UserError, match="did not answer"):
        http_judge(Endpoint(drip.url, "m", timeout=0.3, retries=1), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    drip.socket.close()
    assert drip.asked == 2


@pytest.mark.parametrize("head", [OK + b"\r\n", OK + b"Content-Length: 10000000\r\n\r\n"])
def test_a_reply_without_end_is_given_up(head: bytes) -> None:
    endless = Drip(head, size=1 << 16)
    with pytest.raises(UserError, match="more than"):
        http_judge(Endpoint(endless.url, "m"), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    endless.socket.close()
    assert endless.asked == 1


def test_other_refusals_are_shown_at_once(server: Server) -> None:
    server.script = lambda at, body: (400, {}, "no such model")
    with pytest.raises(UserError, match="400: 'no such model'"):
        http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    assert len(server.asked) == 1
