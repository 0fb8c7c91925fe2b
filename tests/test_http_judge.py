"""A judge behind an endpoint: what it is asked, what is kept, and its keys."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxmed.cli.main import main
from jaxmed.errors import UserError
from jaxmed.evaluation.endpoint import Endpoint
from jaxmed.evaluation.http_judge import http_judge
from jaxmed.evaluation.judges import JUDGES, JudgeSettings, make_judge
from tests.judge_server import ANSWERS, REQUESTS, RUBRIC, Server, endpoint, reply, serving, silent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local endpoint; the key is in the environment."""
    monkeypatch.setenv("A_KEY", "secret-key-1234")
    with serving() as one:
        yield one


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


CODES = [
    "\\u0073ecret-key-1234",
    "%73ecret%2dkey-1234",
    "&#115;ecret-key-1234",
    b64encode(b"Bearer secret-key-1234").decode(),
    b64encode(b"x: secret-key-1234").decode(),
    "secret-key-1234".encode("utf-16").decode("latin-1"),
    "s e c r e t - k e y - 1 2 3 4",
]


@pytest.mark.parametrize("written", CODES)
def test_a_key_that_is_echoed_in_some_code_is_hidden(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key-1234")
    shown = Endpoint("https://judge.example/v1", "m", "JUDGE_KEY").without_secret(f"Wrong key: {written}")
    assert written not in shown
    assert "holds the key" in shown
    monkeypatch.setenv("JUDGE_KEY", "k")
    assert Endpoint("https://judge.example/v1", "m", "JUDGE_KEY").without_secret("no such model") == "no such model"


def test_the_key_goes_to_no_other_host(server: Server) -> None:
    with serving() as other:
        other.script = lambda at, body: reply("5")
        server.script = lambda at, body: (308, {"Location": other.url}, "")
        with pytest.raises(UserError, match="308"):
            http_judge(endpoint(server), RUBRIC)(REQUESTS[:1], ANSWERS[:1], silent)
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
    kept.write_text(kept.read_text().replace('"score": 0.5', '"score": 0.7', 1))  # a flipped bit
    assert judge(REQUESTS, ANSWERS, silent) == [0.5] * 3
    assert len(server.asked) == 5
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
