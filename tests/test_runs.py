"""Run folders: one record of every session, one writer at a time, one request; signals end a run in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmed.cli.evaluate import Evaluate
from jaxmed.cli.main import main
from jaxmed.errors import UserError
from jaxmed.files import read_json
from jaxmed.runs import provenance, signals
from jaxmed.runs.folder import RunFolder, hold, last_versions, open_file, read_run, seconds_spent, time_of
from jaxmed.runs.legal import Legal, check_folder
from tests import tiny

LEGAL = Legal(("table.csv", "parts"), begins=("copy-",), needed=("parts",), measured=("table.csv",))


def _run(out: Path, manifest: Any = None, resume: bool = False, error: BaseException | None = None) -> None:
    with RunFolder.open(out, manifest or {"a": 1}, resume, LEGAL) as folder, folder.session() as session:
        (out / "parts").mkdir(exist_ok=True)
        session.count(items=2)
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (KeyboardInterrupt(), "interrupted"),
        (signals.Interrupted(signal.SIGTERM), "interrupted"),
        (UserError("no room"), "failed"),
        (ZeroDivisionError("oh"), "failed"),
        (SystemExit(3), "interrupted"),
    ],
)
def test_a_session_is_recorded_on_every_exit(tmp_path: Path, error: BaseException | None, status: str) -> None:
    if error is None:
        _run(tmp_path / "out")
    else:
        with pytest.raises(type(error)):
            _run(tmp_path / "out", error=error)
    record = read_run(tmp_path / "out")
    (session,) = record["sessions"]
    assert record["status"] == session["status"] == status
    assert session["items"] == 2
    assert {"started", "ended", "seconds", "versions", "host", "pid"} <= set(session)


def test_sessions_add_up_and_a_killed_one_is_told(tmp_path: Path) -> None:
    _run(tmp_path / "out")
    with RunFolder.open(tmp_path / "out", {"a": 1}, True, LEGAL) as folder:
        folder.record["sessions"][0] |= {"status": "running", "seconds": 5.0}
        folder.note(status="running")
    with RunFolder.open(tmp_path / "out", {"a": 1}, True, LEGAL) as folder:
        assert folder.ended == "killed"
        with folder.session():
            pass
    record = read_run(tmp_path / "out")
    assert [session["status"] for session in record["sessions"]] == ["killed", "finished"]
    assert seconds_spent(record) >= 5
    assert time_of(record) == f"at least {seconds_spent(record):,.0f} s"
    assert "jax" in last_versions(record)


def test_records_of_earlier_versions_are_read() -> None:
    assert seconds_spent({"sessions": [12.5, {"seconds": 2.5}]}) == 15
    assert time_of({"sessions": [12.5, {"seconds": 2.5}]}) == "15 s"
    assert last_versions({"versions": {"jax": "0"}, "sessions": [1.0]}) == {"jax": "0"}


@pytest.mark.parametrize("now", [{"a": 2}, {"a": 1, "labels": ["x"]}, {"a": [1]}, {"a": {"b": 1}}])
def test_a_run_of_another_request_is_not_continued(tmp_path: Path, now: dict[str, Any]) -> None:
    _run(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(UserError, match="another request"):
        _run(tmp_path / "out", now, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


MODEL = {"name": "m", "revision": None, "weights": "5ecc", "dtype": "float32"}


@pytest.mark.parametrize(
    ("now", "same"),
    [
        ({**MODEL, "name": "/elsewhere/m"}, True),
        ({**MODEL, "name": "./m"}, True),
        ({**MODEL, "name": "hub/m", "weights": "0292"}, False),
        ({**MODEL, "weights": "0292"}, False),
        ({**MODEL, "dtype": "bfloat16"}, False),
    ],
)
def test_a_model_is_its_weights_whatever_it_is_called(tmp_path: Path, now: dict[str, Any], same: bool) -> None:
    _run(tmp_path / "out", {"model": MODEL})
    if same:
        _run(tmp_path / "out", {"model": now}, resume=True)
    else:
        with pytest.raises(UserError, match="another request"):
            _run(tmp_path / "out", {"model": now}, resume=True)


@pytest.mark.parametrize("key", ["scores", "source_model", "until"])
def test_what_a_run_began_with_is_not_left_out(tmp_path: Path, key: str) -> None:
    _run(tmp_path / "out", {"a": 1, key: "x"})
    with pytest.raises(UserError, match=f"{key}: x there, None now"):
        _run(tmp_path / "out", {"a": 1}, resume=True)


@pytest.mark.parametrize("content", ["a,b\n1,3\n", "a,b\n1,2", ""])
@pytest.mark.parametrize("ended", ["finished", "interrupted"])
def test_tables_with_other_bytes_are_not_continued(tmp_path: Path, ended: str, content: str) -> None:
    out, table = tmp_path / "out", tmp_path / "out" / "table.csv"
    with (
        pytest.raises(KeyboardInterrupt) if ended == "interrupted" else nullcontext(),
        RunFolder.open(out, {"a": 1}, False, LEGAL) as folder,
        folder.session(),
    ):
        (out / "parts").mkdir()
        table.write_text("a,b\n1,2\n")
        if ended == "interrupted":
            raise KeyboardInterrupt
    _run(out, resume=True)
    table.write_text(content)
    with pytest.raises(UserError, match=r"table\.csv holds other bytes"):
        _run(out, resume=True)
    assert main(["report", str(out)]) == 2
    table.unlink()  # computed again
    _run(out, resume=True)


def test_tables_of_a_killed_run_are_those_of_its_markers(tmp_path: Path) -> None:
    _run(tmp_path / "out")
    (tmp_path / "out" / "table.csv").write_text("a\n")
    with RunFolder.open(tmp_path / "out", {"a": 1}, True, LEGAL) as folder:
        folder.note(status="running", tables={"table.csv": "0" * 64})
    _run(tmp_path / "out", resume=True)


def test_what_is_reused_is_taken_from_the_run_that_goes_on(tmp_path: Path) -> None:
    _run(tmp_path / "out", {"a": 1, "chunk": {"neuron": 8}})
    with RunFolder.open(tmp_path / "out", {"a": 1, "chunk": {"neuron": 16}}, True, LEGAL, reused=("chunk",)) as folder:
        assert folder.manifest["chunk"] == {"neuron": 8}


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "\x1b[31mred", "parts2"])
def test_foreign_files_are_named_harmlessly(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="holds something else") as caught:
        check_folder(tmp_path, True, LEGAL)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["table.csv", "table.csv.tmp", "copy-7", "run.json.tmp", ".lock"])
def test_own_files_are_not_foreign(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    if name == "table.csv":
        with pytest.raises(UserError, match="nobody can say"):
            check_folder(tmp_path, True, LEGAL)
    else:
        assert check_folder(tmp_path, True, LEGAL) is False


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out", {"a": 1}, False, LEGAL) as folder, folder.session():
        (tmp_path / "out" / "parts").mkdir()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
            _run(tmp_path / "out", {"a": 1}, resume=True)
        with pytest.raises(UserError, match="in use"), hold(tmp_path / "out"):
            pass
    assert not (tmp_path / "out" / ".lock").exists()
    with hold(tmp_path / "out"):
        pass


CHILD = """
import pathlib, sys, time
from jaxmed.runs.folder import hold
with hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(tmp_path: Path, number: signal.Signals) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="in use"), hold(tmp_path):
        pass
    child.send_signal(number)
    child.wait()
    child.stdout.close()
    with hold(tmp_path):
        pass


def _send(number: signal.Signals) -> None:
    """Sends a signal to this process; its handler runs before the next line."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_and_has_its_exit_code(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(signals.Interrupted, match=number.name) as caught, signals.handled():
        _send(number)
    assert signals.exit_code(caught.value) == code
    assert signal.getsignal(number) is before
    signals.check()  # forgotten outside


@pytest.mark.parametrize("number", signals.HANDLED)
def test_a_swallowed_signal_is_raised_at_the_next_item(number: signal.Signals) -> None:
    def item() -> None:
        try:
            _send(number)
        except BaseException:  # as callbacks of libraries do
            return

    def items() -> None:
        with signals.handled():
            item()
            signals.check()
            pytest.fail("the run went on")

    with pytest.raises(signals.Interrupted):
        items()


def test_a_record_is_written_before_a_signal_counts() -> None:
    done = []

    def write() -> None:
        with signals.handled():
            with signals.delayed():
                _send(signal.SIGTERM)
                done.append("written")
            signals.check()
            done.append("next")

    with pytest.raises(signals.Interrupted):
        write()
    assert done == ["written"]


SECOND = """
import os, signal, sys, time
from jaxmed.runs import provenance, signals
with signals.handled():
    try:
        os.kill(os.getpid(), signal.SIGINT); time.sleep(1)
    except KeyboardInterrupt:
        print("first", flush=True)
        os.kill(os.getpid(), int(sys.argv[1])); time.sleep(1)
        print("second", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", SECOND, str(int(number))], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("first\n", code)


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled():
            _send(signal.SIGINT)
            signals.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_is_a_run_too(tmp_path: Path) -> None:
    out = tmp_path / "made" / "out.json"

    def cut() -> None:
        with open_file(out, {"a": 1}, False) as file, file.session():
            file.note(first=0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut()
    for resume, manifest, said in ((False, {"a": 1}, "Add --resume"), (True, {"a": 2}, "another request")):
        with pytest.raises(UserError, match=said), open_file(out, manifest, resume):
            pass
    with open_file(out, {"a": 1}, True) as file, file.session():
        assert file.record["first"] == 0.5
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), open_file(out, {"a": 1}, True):
            pass
    record = read_json(out)
    assert [session["status"] for session in record["sessions"]] == ["interrupted", "finished"]
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize("content", ["[1]", "{", '{"sessions": 3}', '{"manifest": 1}'])
def test_a_file_that_is_no_run_is_not_written_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.json").write_text(content)
    with pytest.raises(UserError, match=r"out\.json"), open_file(tmp_path / "out.json", {}, True):
        pass
    assert (tmp_path / "out.json").read_text() == content


def test_an_evaluation_resumes_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(model)
    (tmp_path / "text.txt").write_text("how to help and how to harm " * 30)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say x", "response": "I cannot help with that."}\n')
    words = f"evaluate --model {model} --examples {tmp_path}/rows.jsonl --given --text {tmp_path}/text.txt --judge rules --out".split()
    assert main([*words, str(tmp_path / "whole.json")]) == 0
    measure = Evaluate._perplexity
    monkeypatch.setattr(Evaluate, "_perplexity", lambda *_: (_ for _ in ()).throw(signals.Interrupted(signal.SIGTERM)))
    assert main([*words, str(tmp_path / "cut.json")]) == 143
    assert read_json(tmp_path / "cut.json")["parts"] == ["judged"]
    monkeypatch.setattr(Evaluate, "_perplexity", measure)
    monkeypatch.setattr(Evaluate, "_judged", lambda *_: pytest.fail("judged again"))
    assert main([*words, str(tmp_path / "cut.json"), "--resume"]) == 0
    whole, cut = (read_json(tmp_path / f"{name}.json") for name in ("whole", "cut"))
    assert [session["status"] for session in cut["sessions"]] == ["interrupted", "finished"]
    for record in (whole, cut):
        del record["sessions"]
    assert whole == cut


@pytest.mark.parametrize("changed", ["values.npy", "edits.json", "rubric.txt"])
def test_an_evaluation_is_of_what_its_files_hold(tmp_path: Path, changed: str) -> None:
    """A file of numbers that edits name, and a rubric, under their old names with other contents."""
    files = {name: tmp_path / name for name in ("values.npy", "edits.json", "rubric.txt")}
    np.save(files["values.npy"], np.ones(3))
    files["edits.json"].write_text('[{"kind": "steer", "site": "mlp_out", "direction": "values.npy"}]')
    files["rubric.txt"].write_text("{prompt} {response}")
    asked = Evaluate(edits=files["edits.json"], rubric=str(files["rubric.txt"]), text="")
    before, judged = asked._manifest([])["contents"], asked.record()
    np.save(files[changed], np.zeros(3)) if changed == "values.npy" else files[changed].write_text(files[changed].read_text() + " ")
    assert asked._manifest([])["contents"] != before
    assert (asked.record() != judged) == (changed == "rubric.txt")


def test_a_checkout_says_its_commit() -> None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert str(provenance.commit()).removesuffix("+") == head
    assert provenance.short_commit().startswith(head[:12])
