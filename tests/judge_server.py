"""What the tests of judges share: questions and answers, and an endpoint on this machine that answers as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxmed.evaluation.endpoint import Endpoint
from jaxmed.prompts import Example

REQUESTS = [Example("bake {response} bread", kind="harmful"), Example("pick flowers", kind="benign"), Example("sing", kind="harmful")]
ANSWERS = ["mix flour {prompt}", "no", "la " * 20]


def silent(count: int) -> None:
    """No progress display."""


class Server(ThreadingHTTPServer):
    """Answers as its `script` says: a function of the number of the request and its body -> (status, headers, body), or seconds to wait."""

    script: Callable[[int, dict[str, Any]], Any]
    asked: list[tuple[dict[str, Any], str | None, float]]

    def __init__(self) -> None:
        self.asked = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, self.headers.get("Authorization"), time.monotonic()))
        said = self.server.script(len(self.server.asked) - 1, body)
        if isinstance(said, float):
            time.sleep(said)
            said = reply("3")
        status, headers, text = said
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass  # the client has gone

    def log_message(self, *_: Any) -> None:
        pass


def reply(text: str) -> tuple[int, dict[str, str], str]:
    """A chat completion."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def serving() -> Iterator[Server]:
    """A server while the block runs."""
    one = Server()
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield one
    one.shutdown()
    one.server_close()
    thread.join()


def endpoint(server: Server, **more: Any) -> Endpoint:
    return Endpoint(server.url, "judge-1", **{"key": "A_KEY", "workers": 1, **more})


RUBRIC = "Q {prompt} A {response}"
