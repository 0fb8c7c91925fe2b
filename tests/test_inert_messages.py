"""Messages are bounded, and inert in a terminal, whatever stands in the files that they are about."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import jaxmed as jm
from jaxmed.cli import show
from jaxmed.cli.main import main
from jaxmed.errors import LONGEST_MESSAGE, UserError, all_problems, unknown, visible
from jaxmed.prompts.examples import read_examples

UGLY = ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\rb", "\x9b2J", "\u202egnp.exe", "nul\x00", "\u2028next", "\x08\x08\x7f"]


def inert(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("name", UGLY)
def test_control_characters_are_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert inert(visible(name))
    assert visible(visible(name)) == visible(name)
    assert inert(str(UserError(f"About {name}")))
    assert inert(str(unknown("thing", name, [name, "b"])))
    assert inert(str(all_problems(name, [name], name)))
    rows = [{"id": name, "base": "x", "source": "y", "target": ["S"], "foil": [], name: 1, "split": name}] * 2
    for read in (
        lambda: jm.read_pairs(rows),
        lambda: read_examples([{"prompt": "x", "split": name}]),
        lambda: read_examples([{name: "x"}]),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert inert(str(caught.value))
    show.table(name, ["a", "b"], [[name, name]])
    show.lines(name, [name])
    assert main(["report", str(tmp_path / name.replace("\x00", ""))]) == 2
    said = capsys.readouterr()
    assert inert(said.out + said.err)


def test_a_name_with_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show.lines("[bold]x[/bold] [/nothing]", ["[red]y[/red]"])
    assert capsys.readouterr().out.splitlines() == ["[bold]x[/bold] [/nothing]", "  [red]y[/red]"]


def test_ten_problems_of_a_kind_are_shown_and_the_others_counted() -> None:
    same = [f"line {at}: the column 'c{at}' holds 'x\\'{at}'." for at in range(200_000)]
    said = str(all_problems("file", [*same, "line 7: another thing."], "Mend it.")).splitlines()
    assert said[0] == "file: 200,001 problems:"
    assert said[1:11] == [f"  - {problem}" for problem in same[:10]]
    assert said[11:] == ["  - line 7: another thing.", "  (+199,990 more, of 2 kinds in all)", "Mend it."]


def test_few_problems_are_shown_whole() -> None:
    assert str(all_problems("file", ["a", "b"])) == "file: 2 problems:\n  - a\n  - b"


@pytest.mark.parametrize("count", [50_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_messages_about_very_large_files_are_short(tmp_path: Path, count: int) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n" * count)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"id": "{at}", "base": "x"}}\n' for at in range(count)))
    with (tmp_path / "c.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["prompt", "split"], *([f"p{at}", f"s{at}"] for at in range(count))])
    for read, name in (
        (jm.read_pairs, "a.jsonl"),
        (jm.read_pairs, "b.jsonl"),
        (lambda file: read_examples(file, responses=False), "c.csv"),
    ):
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert len(str(caught.value).splitlines()) < 20
        assert f"{count:,} problems" in str(caught.value)


def test_long_values_and_lists_are_cut() -> None:
    assert len(str(UserError("x" * 10**7))) < LONGEST_MESSAGE + 100
    assert len(str(unknown("name", "y" * 10**6, [f"name{at}" for at in range(10**5)]))) < 3000
    deep = json.loads("[" * 500 + "]" * 500)
    with pytest.raises(UserError) as caught:
        jm.read_pairs([{"id": "a", "base": deep, "source": 10**5000, "target": ["S"], "foil": ["N"]}])
    assert len(str(caught.value)) < 2000
