"""Files: written whole or not at all, read back as they were, refused with one message."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmed.cli.flags import check_absent
from jaxmed.errors import UserError
from jaxmed.files import (
    ArrayLayout,
    atomic,
    check_file,
    check_path,
    check_sums,
    open_array,
    read_csv,
    read_json,
    read_text,
    write_csv,
    write_json,
    write_sums,
    write_text,
)
from jaxmed.files.arrays import kvstore
from jaxmed.models.checkpoints.new_folder import check_vacant
from jaxmed.pruning.masks import Mask, write_mask
from jaxmed.reports.page import write_report
from jaxmed.runs.legal import Legal, check_folder

TEXTS = (
    "plain",
    "",
    "a,b",
    'a "quoted" word',
    "two\nlines",
    "a\u2028b",
    "=1+1",
    "-x",
    "@sum",
    "'=x",
    "''=",
    "' ='",
    "-1.5",
    "日本",
    " led",
    "\ttab",
)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_in_a_table_come_back(tmp_path: Path, text: str) -> None:
    write_csv(tmp_path / "t.csv", [{"name": text, "number": -0.25}])
    assert read_csv(tmp_path / "t.csv", texts=("name",)) == [{"name": text, "number": -0.25}]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8), min_size=1, max_size=4))
def test_any_text_in_a_table_comes_back(tmp_path_factory: pytest.TempPathFactory, cells: list[str]) -> None:
    file = tmp_path_factory.mktemp("csv") / "t.csv"
    write_csv(file, [{"n": number, "name": cell} for number, cell in enumerate(cells)])
    assert [row["name"] for row in read_csv(file, texts=("name",))] == cells


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "@SUM(A1)", "-2+3"])
def test_a_spreadsheet_runs_nothing(tmp_path: Path, text: str) -> None:
    write_csv(tmp_path / "t.csv", [{"name": text}])
    assert (tmp_path / "t.csv").read_text().splitlines()[1].lstrip('"').startswith("'")


def test_numbers_in_a_table_come_back_to_the_bit(tmp_path: Path) -> None:
    row = {"a": 1 / 3, "b": -7, "c": math.inf, "d": 1e-300}
    write_csv(tmp_path / "t.csv", [row])
    assert read_csv(tmp_path / "t.csv", texts=()) == [row]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (math.nan, None),
        ([-math.inf, 1.5], [None, 1.5]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        ({"a": (1, np.nan)}, {"a": [1, None]}),
        ("a\u2028b", "a\u2028b"),
        (Path("x/y"), "x/y"),
        (True, True),
    ],
)
def test_json_is_what_every_reader_takes(tmp_path: Path, value: Any, kept: Any) -> None:
    write_json(tmp_path / "x.json", {"value": value})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == read_json(tmp_path / "x.json") == {"value": kept}
    assert "\u2028" not in text


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b'{"a": "\xe9"}', b"[" * 100_000, b""])
def test_damaged_json_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfword")
    assert read_text(tmp_path / "x") == "word"


def test_half_of_a_surrogate_pair_is_written_out(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "a\ud800b")
    assert (tmp_path / "x").read_text() == "a\\ud800b"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_what_is_not_finished_leaves_the_file_as_it_was(tmp_path: Path, error: Any) -> None:
    write_text(tmp_path / "x", "before")

    def write() -> None:
        with atomic(tmp_path / "x") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(UserError if isinstance(error, OSError) else error):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"


PATHS = {
    "a NUL byte": "a\0b",
    "too long a name": "x" * 300,
    "too long a path": "/".join(["long"] * 1000),
    "a link to itself": "loop",
    "a circle of links": "one/out",
    "a link to nothing": "dangling",
    "below a link to nothing": "dangling/out",
    "below a file": "file/out",
}


@pytest.mark.parametrize("kind", PATHS)
def test_a_path_that_nothing_can_be_written_to_is_one_message(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    for name, target in (("loop", "loop"), ("one", "other"), ("other", "one"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(target)
    held = sorted(path.name for path in tmp_path.iterdir())
    checks: list[Callable[[Path], Any]] = [check_path, check_file, lambda path: check_folder(path, False, Legal(()))]
    checks += [check_absent, lambda path: check_vacant(path, 1), lambda path: write_report([tmp_path], path)]
    checks += [lambda path: write_mask(Mask({}, {}), path)]
    for check in checks:
        with pytest.raises(UserError, match="nothing was written"):
            check(tmp_path / PATHS[kind])
    assert held == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("at", ["out.csv", "out.csv.tmp"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_file_is_neither_replaced_nor_written_through(tmp_path: Path, at: str, kind: str) -> None:
    """As /dev/null would be, and what a link of the partial file's name leads to."""
    (tmp_path / "other").write_text("kept")
    os.mkfifo(tmp_path / at) if kind == "pipe" else (tmp_path / at).symlink_to("other" if at.endswith(".tmp") else "gone")
    if at.endswith(".tmp"):
        write_csv(tmp_path / "out.csv", [{"a": 1}])
        assert read_csv(tmp_path / "out.csv") == [{"a": "1"}]
        assert (tmp_path / "other").read_text() == "kept"
        return
    with pytest.raises(UserError, match="is no regular file"):
        write_csv(tmp_path / "out.csv", [{"a": 1}])
    with pytest.raises(UserError, match="is no regular file"):
        read_json(tmp_path / "out.csv")
    assert (tmp_path / at).is_fifo() or (tmp_path / at).is_symlink()


def test_links_to_folders_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    check_path(tmp_path / "link" / "run")


def _array(folder: Path) -> Any:
    array = open_array(folder, ArrayLayout((4, 6), (2, 6)))
    array[:2].write(np.zeros((2, 6), np.float32)).result()
    array[2:].write(np.ones((2, 6), np.float32)).result()
    return array


DAMAGE = {
    "flipped bit": lambda content: content[:9] + bytes([content[9] ^ 1]) + content[10:],
    "cut": lambda content: content[:-3],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}
"""What happens to stored bytes."""


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("chunk", ["c/0/0", "c/1/0"])
def test_damaged_chunks_are_not_read(tmp_path: Path, kind: str, chunk: str) -> None:
    _array(tmp_path / "a")
    file = tmp_path / "a" / chunk
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    with pytest.raises(ValueError, match=chunk):
        open_array(tmp_path / "a").read().result()


@pytest.mark.parametrize("chunk", ["c/0/0", "c/1/0"])
def test_missing_chunks_are_not_read_as_zeros(tmp_path: Path, chunk: str) -> None:
    _array(tmp_path / "a")
    (tmp_path / "a" / chunk).unlink()
    with pytest.raises(ValueError, match="missing"):
        open_array(tmp_path / "a").read().result()
    assert open_array(tmp_path / "a", partial=True).read().result().shape == (4, 6)


def test_arrays_are_places_by_url() -> None:
    assert kvstore("gs://bucket/a/b") == {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    assert kvstore("s3://bucket/a/") == {"driver": "s3", "bucket": "bucket", "path": "a/"}
    assert kvstore("file:///x/y") == kvstore("/x/y") == {"driver": "file", "path": "/x/y/"}
    with pytest.raises(UserError, match="s4"):
        kvstore("s4://bucket/a")


@pytest.mark.parametrize("kind", [*DAMAGE, "missing"])
def test_digests_beside_files_find_damage(tmp_path: Path, kind: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(range(1, 99)))
    write_sums(tmp_path, [tmp_path / "a", tmp_path / "b"])
    check_sums(tmp_path)
    file = tmp_path / "b"
    file.unlink() if kind == "missing" else file.write_bytes(DAMAGE[kind](file.read_bytes()))
    with pytest.raises(UserError, match=r"b (holds other bytes|is missing)") as caught:
        check_sums(tmp_path)
    assert "  - a" not in str(caught.value)
