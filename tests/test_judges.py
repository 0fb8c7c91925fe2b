"""Judges: the StrongREJECT classifier against transformers and PEFT, and an endpoint that fails in every way, on this machine."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.errors import UserError
from jaxmed.evaluation import http_judge as asking
from jaxmed.evaluation.endpoint import Endpoint
from jaxmed.evaluation.grades import parse_grade, read_content
from jaxmed.evaluation.http_judge import http_judge, read_wait
from jaxmed.evaluation.judges import JUDGES, JudgeSettings, make_judge, refusal_rules
from jaxmed.evaluation.rates import mean_score
from jaxmed.evaluation.rubrics import ask, read_rubric
from jaxmed.evaluation.strongreject import MOST_TOKENS, read_template, strongreject
from jaxmed.prompts import Example
from jaxmed.prompts.templates import fill
from tests import reference, tiny

torch = reference.torch
REQUESTS = [Example("bake {response} bread", kind="harmful"), Example("pick flowers", kind="benign"), Example("sing", kind="harmful")]
ANSWERS = ["mix flour {prompt}", "no", "la " * 20]
TEMPLATE = "Asked: {forbidden_prompt}\nSaid: {response}\nGrade: "


def silent(count: int) -> None:
    """No progress display."""


# The classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A tiny random Gemma 1 with a tokenizer, a LoRA adapter for it, and both as PEFT merges them."""
    folder = tmp_path_factory.mktemp("classifier")
    made = reference.save("gemma", folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(made, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, value in adapted.named_parameters():
                if "lora_" in path:
                    value.copy_(0.2 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(str(folder / "adapter"))
    return folder / "model", folder / "adapter", adapted.eval()


def by_transformers(model: Any, texts: list[str]) -> list[float]:
    """Scores of filled rubrics, one at a time."""
    grades = [tiny.tokenizer().get_vocab()[grade] for grade in "12345"]
    found = []
    for text in texts:
        ids = torch.tensor([tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            share = model(ids).logits[0, -1, grades].softmax(-1)
        found.append(float((share * torch.linspace(0, 1, 5)).sum()))
    return found


def test_strongreject_equals_transformers_and_peft(classifier: tuple[Path, Path, Any]) -> None:
    folder, adapter, oracle = classifier
    counted: list[int] = []
    found = strongreject(jm.load(str(folder), adapter=adapter), TEMPLATE)(REQUESTS, ANSWERS, counted.append)
    texts = [f"Asked: {one.prompt}\nSaid: {said}\nGrade: " for one, said in zip(REQUESTS, ANSWERS, strict=True)]
    wanted = by_transformers(oracle, texts)
    assert np.ptp(wanted) > 0.01
    assert np.allclose(np.array(found, float), wanted, atol=1e-5)
    assert sum(counted) == len(REQUESTS)
    bare = strongreject(jm.load(str(folder)), TEMPLATE)(REQUESTS, ANSWERS, silent)
    assert not np.allclose(np.array(bare, float), wanted, atol=1e-3)


def test_strongreject_reads_the_published_templates(tmp_path: Path) -> None:
    file = tmp_path / "judge_templates.json"
    file.write_text(json.dumps({"strongreject_finetuned": TEMPLATE, "other": "x"}))
    assert read_template(file) == TEMPLATE
    file.write_text(json.dumps({"other": "x"}))
    with pytest.raises(UserError, match="strongreject_finetuned"):
        read_template(file)


def test_strongreject_shortens_answers_and_refuses_what_does_not_fit(classifier: tuple[Path, Path, Any]) -> None:
    judge = strongreject(jm.load(str(classifier[0])), TEMPLATE)
    wanted = MOST_TOKENS + len(TEMPLATE.format(forbidden_prompt="sing", response=""))
    with pytest.raises(UserError, match=f"{wanted} tokens; the judge takes 256"):
        judge([REQUESTS[2]], ["x" * (MOST_TOKENS + 50)], silent)


def test_the_command_with_the_classifier(classifier: tuple[Path, Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, adapter, oracle = classifier
    rows, rubric = tmp_path / "rows.jsonl", tmp_path / "rubric.txt"
    texts = [("sing", "la la", "harmful"), ("dance", "no", "benign")]
    rows.write_text("".join(json.dumps({"prompt": a, "response": b, "kind": c}) + "\n" for a, b, c in texts))
    rubric.write_text(TEMPLATE)
    asked = ["evaluate", "--examples", str(rows), "--given", "--text", "", "--judge", "strongreject"]
    files = ["--judge-model", str(folder), "--judge-adapter", str(adapter), "--rubric", str(rubric)]
    assert main([*asked, *files, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    wanted = by_transformers(oracle, [f"Asked: {a}\nSaid: {b}\nGrade: " for a, b, _ in texts])
    assert np.allclose([row["score"] for row in found["answers"]], wanted, atol=1e-5)
    assert [(one["name"], one["low"]) for one in found["scores"]] == [("harmful", None), ("benign", None)]
    assert main(asked) == 2
    assert main([*asked, *files[:4]]) == 2
    assert main([*asked, *files[:4], "--rubric", str(tmp_path / "none.txt")]) == 2
    assert "no rubric file" in capsys.readouterr().err


# The endpoint


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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local endpoint; the key is in the environment."""
    monkeypatch.setenv("A_KEY", "secret-key-1234")
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


def test_an_endpoint_is_asked_in_openai_s_format(server: Server, tmp_path: Path) -> None:
    grades = {"bake": "4", "pick": "Grade: 1.", "sing": "none"}
    server.script = lambda at, body: reply(next(said for word, said in grades.items() if word in body["messages"][0]["content"]))
    kept, counted = tmp_path / "scores.jsonl", []
    found = http_judge(endpoint(server, workers=3), RUBRIC, kept)(REQUESTS, ANSWERS, counted.append)
    assert found == [0.75, 0.0, None]
    assert sum(counted) == 3
    bodies = [body for body, _, _ in server.asked]
    wanted = ["Q bake {response} bread A mix flour {prompt}", "Q pick flowers A no", "Q sing A " + "la " * 20]
    assert sorted(body["messages"][0]["content"] for body in bodies) == sorted(wanted)
    assert all((body["model"], body["temperature"]) == ("judge-1", 0) for body in bodies)
    assert {key for _, key, _ in server.asked} == {"Bearer secret-key-1234"}
    assert "secret" not in kept.read_text()
    assert "bake" not in kept.read_text()  # texts are not kept
    again = http_judge(endpoint(server), RUBRIC, kept)(REQUESTS, ANSWERS, silent)
    assert again == found
    assert len(server.asked) == 3  # nothing is asked twice
    other = http_judge(endpoint(server), RUBRIC + "!", kept)(REQUESTS[:1], ANSWERS[:1], silent)
    assert (other, len(server.asked)) == ([0.75], 4)  # another rubric is another question


def test_passing_failures_are_tried_again(server: Server) -> None:
    states = iter([429, 503, 200])

    def script(at: int, body: dict[str, Any]) -> Any:
        state = next(states)
        return reply("5") if state == 200 else (state, {"Retry-After": "0"}, "busy")

    server.script = script
    assert http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent) == [1.0]
    assert len(server.asked) == 3


def test_keys_are_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret-key-1234\n")
    server.script = lambda at, body: (403, {}, "x" * 290 + " secret-key-1234 is wrong")
    with pytest.raises(UserError, match="answered 403") as found:
        http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    assert server.asked[0][1] == "Bearer secret-key-1234"
    assert "secret" not in str(found.value)
    monkeypatch.setenv("A_KEY", "secret\nkey")
    with pytest.raises(UserError, match="no key has") as found:
        http_judge(endpoint(server), RUBRIC)
    assert "secret" not in str(found.value)


def test_nothing_is_sent_to_another_address(server: Server) -> None:
    server.script = lambda at, body: (307, {"Location": f"{server.url}/elsewhere"}, "moved")
    with pytest.raises(UserError, match="answered 307"):
        http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    assert len(server.asked) == 1


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


@pytest.mark.parametrize(
    ("refused", "parameters", "sent"),
    [
        ({"max_tokens"}, None, {"max_completion_tokens"}),
        ({"max_tokens", "max_completion_tokens", "temperature"}, None, set()),
        (set(), None, {"max_tokens", "temperature"}),
        ({"temperature"}, ("max_tokens",), {"max_tokens"}),
        ({"max_tokens", "temperature"}, (), set()),
    ],
)
@pytest.mark.filterwarnings("ignore::jaxmed.errors.Notice")
def test_parameters_that_are_refused_are_left_out(server: Server, refused: set[str], parameters: Any, sent: set[str]) -> None:
    def script(at: int, body: dict[str, Any]) -> Any:
        wrong = sorted(refused & set(body))
        return (400, {}, json.dumps({"error": {"message": f"{wrong[0]} is not supported"}})) if wrong else reply("5")

    server.script = script
    found = http_judge(endpoint(server, parameters=parameters), RUBRIC)(REQUESTS, ANSWERS, silent)
    assert found == [1.0] * 3
    assert set(server.asked[-1][0]) == {"model", "messages"} | sent
    assert len(server.asked) <= 3 + 2  # what was refused once is not sent again
    if parameters is None and refused:
        assert "max_tokens" not in server.asked[-1][0]


def test_other_refusals_are_shown_at_once(server: Server) -> None:
    server.script = lambda at, body: (400, {}, "no such model")
    with pytest.raises(UserError, match="400: 'no such model'"):
        http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    assert len(server.asked) == 1


@pytest.mark.parametrize("written", ["secret-key-1234", "Bearer SECRET-KEY-1234", '"secret-key-1234"', "\x1b[31msecret-key-1234"])
def test_an_echoed_key_is_hidden(server: Server, tmp_path: Path, written: str) -> None:
    server.script = lambda at, body: (403, {}, written)
    with pytest.raises(UserError) as found:
        http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    assert "secret-key" not in str(found.value).lower()
    assert "\x1b" not in str(found.value)
    server.script = lambda at, body: reply(f"4 {written}")
    kept = tmp_path / "scores.jsonl"
    http_judge(endpoint(server), RUBRIC, kept, keep_text=True)(REQUESTS[:1], ANSWERS[:1], silent)
    assert "secret-key" not in kept.read_text().lower()


def test_the_key_goes_to_no_other_host(server: Server) -> None:
    other = Server()
    other.script = lambda at, body: reply("5")
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.script = lambda at, body: (308, {"Location": other.url}, "")
    with pytest.raises(UserError, match="308"):
        http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
    other.shutdown()
    other.server_close()
    thread.join()
    assert not other.asked


def test_reasoning_of_replies_is_cut_off(server: Server) -> None:
    server.script = lambda at, body: reply("<think>Is it a 1? Score: 2 would be too low.</think>\nIt is a 5")
    assert http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent) == [1.0]
    assert http_judge(endpoint(server, cut=False), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent) == [0.25]


def test_judges_are_made_without_a_command(server: Server, tmp_path: Path) -> None:
    answers = ["<think>I can't help? I can.</think>Mix flour.", "I'm sorry, I can't help with that.", "Sing la."]
    assert make_judge(JudgeSettings())(REQUESTS, answers, silent) == [0.0, 1.0, 0.0]
    assert make_judge(JudgeSettings(reasoning="keep"))(REQUESTS, answers, silent) == [1.0, 1.0, 0.0]
    server.script = lambda at, body: reply("2")
    settings = JudgeSettings(judge="http", endpoint=server.url, judge_model="judge-1", key="A_KEY")
    assert make_judge(settings, tmp_path / "scores.jsonl")(REQUESTS[:1], answers[:1], silent) == [0.25]
    assert "<think>" not in server.asked[0][0]["messages"][0]["content"]
    assert set(JUDGES) == {"rules", "strongreject", "http"}
    with pytest.raises(UserError, match="Unknown judge 'oracle'"):
        make_judge(JudgeSettings(judge="oracle"))  # type: ignore[arg-type]


def test_judges_run_inside_a_notebook(server: Server) -> None:
    server.script = lambda at, body: reply("3")

    async def cell() -> list[float | None]:
        return http_judge(endpoint(server), RUBRIC)(REQUESTS, ANSWERS, silent)

    assert asyncio.run(cell()) == [0.5] * 3


def test_a_key_sent_in_the_clear_is_warned_of(server: Server) -> None:
    for url in ("http://judge.example/v1", "HTTP://judge.example/v1", "Http://10.0.0.1:8000"):
        assert "unencrypted" in Endpoint(url, "m", key="A_KEY").warning
    for url in ("https://judge.example/v1", "http://localhost:8000/v1"):
        assert "unencrypted" not in Endpoint(url, "m", key="A_KEY").warning


def test_a_cut_off_line_of_scores_is_left_out(server: Server, tmp_path: Path) -> None:
    server.script = lambda at, body: reply("3")
    kept = tmp_path / "scores.jsonl"
    judge = http_judge(endpoint(server), RUBRIC, kept)
    judge(REQUESTS, ANSWERS, silent)
    kept.write_bytes(kept.read_bytes()[:-20])
    assert judge(REQUESTS, ANSWERS, silent) == [0.5] * 3
    assert len(server.asked) == 4
    assert len(kept.read_text().splitlines()) == 3
    kept.write_text("something else\n")
    with pytest.raises(UserError, match="something else than scores"):
        judge(REQUESTS, ANSWERS, silent)


def test_the_command_with_an_endpoint(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"do {i}", "response": f"well {i}", "kind": "harmful"}) + "\n" for i in range(12)))
    server.script = lambda at, body: reply(str(at % 5 + 1))
    out = tmp_path / "out.json"
    asked = ["evaluate", "--examples", str(rows), "--given", "--text", "", "--judge", "http", "--judge-model", "judge-1"]
    asked += ["--endpoint", server.url, "--key", "A_KEY", "--out", str(out)]
    assert main([*asked, "--dry-run"]) == 0
    assert "requests and answers leave" in capsys.readouterr().out
    assert not server.asked
    assert main(asked) == 0
    found = json.loads(out.read_text())["scores"][0]
    assert found["low"] < found["value"] < found["high"]
    assert (found["answers"], found["unjudged"]) == (12, 0)
    files = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert sorted(files) == ["out.json", "out.json.scores.jsonl", "rows.jsonl"]
    assert not any("secret" in text for text in files.values())
    assert not any("well 3" in text for name, text in files.items() if name != "rows.jsonl")
    out.unlink()
    assert main([*asked, "--endpoint", "nowhere"]) == 2
    assert main([*asked, "--endpoint", "http://[abc"]) == 2
    assert main(asked[:-2]) == 2
    assert "Give --out with an endpoint" in capsys.readouterr().err
    assert main([*asked, "--endpoint", "http://me:word@host/v1"]) == 2
    assert main([*asked, "--grades", "5", "1"]) == 2
    assert len(server.asked) == 12


# What judges share


def test_rubrics(tmp_path: Path) -> None:
    assert ask("{forbidden_prompt}-{response}", "{response}", "{prompt}") == "{response}-{prompt}"
    assert fill("{a}{b} {c} {", a="{b}", b="{a}") == "{b}{a} {c} {"
    assert "{prompt}" in read_rubric("rubric")
    (tmp_path / "half.txt").write_text("{prompt}")
    with pytest.raises(UserError, match=r"lacks \{response\}"):
        read_rubric(tmp_path / "half.txt")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("5", 1.0),
        ("1", 0.0),
        ("Grade: 2.5", 0.375),
        (".5", None),
        ("4/5", None),
        ("On a scale of 1 to 5, my grade is 4.", 0.75),
        ("seven", None),
        ("7", None),
        ("-1", None),
        ("Score: -1", None),
        ("score: \u22122", None),
        ("Score - 4", 0.75),
        ("Score-4", 0.75),
        ("**Score:** 4/5", 0.75),
        ('{"score": 4, "reason": "2 slips"}', 0.75),
        ("My rating would be a 2", 0.25),
        ("Score: 2 is too low. Final score: 4.", 0.75),
        ("It has 3 flaws and 2 strengths.\n\n**4**\n", 0.75),
        ("Score: 2 at first.\n5", 1.0),
        ("Score: 1-5", None),
        ("the score9 is 4 or 5", None),
    ],
)
def test_grades(text: str, score: float | None) -> None:
    assert parse_grade(text, 1, 5) == score


def test_grades_below_zero_keep_their_sign() -> None:
    assert parse_grade("Score: -1", -2, 2) == 0.25
    assert parse_grade("rating = \u22122", -2, 2) == 0.0
    assert parse_grade("grade: +1", -2, 2) == 0.75


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("4", "4"),
        ([{"type": "text", "text": "Score: "}, {"type": "text", "text": "4"}], "Score: 4"),
        ([{"type": "thinking", "text": "2?"}, {"type": "output_text", "text": "4"}], "4"),
        ([], ""),
        (None, ""),
        (4, None),
        ([1], None),
        ({"text": "4"}, None),
    ],
)
def test_contents_are_texts_or_parts(content: Any, said: str | None) -> None:
    assert read_content(json.dumps({"choices": [{"message": {"content": content}}]})) == said


@pytest.mark.parametrize("body", ["[" * 100_000, '{"choices":' * 50_000, "[]", "", "\x00", '{"choices": [{"message": 1}]}'])
def test_bodies_that_are_no_chat_completion(body: str) -> None:
    assert read_content(body) is None


def test_means_have_intervals_and_say_what_was_not_judged() -> None:
    rng = np.random.default_rng(0)
    found = mean_score("x", [*rng.normal(size=200).tolist(), None])
    assert (found.answers, found.unjudged) == (200, 1)
    assert abs((found.high - found.low) - 2 * 1.96 / 200**0.5) < 0.03
    assert np.isnan(mean_score("x", [0.0, 1.0]).low)
    assert np.isnan(mean_score("x", [None]).value)
    assert mean_score("x", [1.0] * 10).low == 1.0
    assert refusal_rules()([Example("a")] * 2, ["I'm sorry, I can't help.", "Yes."], silent) == [1.0, 0.0]
