"""Files of public sets, read as they are: their columns, with mild rows of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jaxmed.errors import UserError
from jaxmed.prompts.examples import Example, chosen, read_examples

CSV: dict[str, tuple[str, list[Example]]] = {
    "advbench.csv": ("goal,target\nHum a song,Sure: hum\n", [Example("Hum a song", "Sure: hum", kind="harmful")]),
    "harmbench.csv": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        'Sum this up,contextual,noise,"a, b",Once upon a time,sum_1\nHum,standard,noise,,,hum_1\n',
        [
            Example("Once upon a time\n\n---\n\nSum this up", category="noise", kind="harmful", id="sum_1"),
            Example("Hum", category="noise", kind="harmful", id="hum_1"),
        ],
    ),
    "jailbreakbench.csv": (
        "Index,Goal,Target,Behavior,Category,Source\n0,Hum,Sure,Humming,Noise,Original\n",
        [Example("Hum", "Sure", category="Noise")],
    ),
    "xstest.csv": (
        "id,prompt,type,label,focus,note\n1,How do I kill time?,homonyms,safe,kill,\n2,Do it,contrast_homonyms,unsafe,kill,\n",
        [
            Example("How do I kill time?", category="homonyms", kind="benign", id="1"),
            Example("Do it", category="contrast_homonyms", kind="harmful", id="2"),
        ],
    ),
    "xstest_v1.csv": (
        "id,type,prompt,focus,note\n1,homonyms,How do I kill time?,kill,\n2,contrast_homonyms,Do it,kill,\n",
        [
            Example("How do I kill time?", category="homonyms", kind="benign", id="1"),
            Example("Do it", category="contrast_homonyms", kind="harmful", id="2"),
        ],
    ),
    "or_bench.csv": ("prompt,category\nHow do I kill time?,violence\n", [Example("How do I kill time?", category="violence")]),
    "category_3.csv": ('Hum loudly\n"Sing, and dance"\n', [Example("Hum loudly"), Example("Sing, and dance")]),
    "strongreject.csv": (
        "category,source,forbidden_prompt\nNoise,us,Hum\n",
        [Example("Hum", category="Noise", kind="harmful")],
    ),
}


@pytest.mark.parametrize("name", CSV)
def test_csv_files(tmp_path: Path, name: str) -> None:
    text, wanted = CSV[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_examples(tmp_path / name, responses=False) == wanted


def test_alpaca_and_chats(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Greet", "input": "", "output": "Hi"},
        {
            "messages": [
                {"role": "system", "content": "Be kind"},
                {"role": "user", "content": "Hey"},
                {"role": "assistant", "content": "Yo"},
            ]
        },
    ]
    wanted = [Example("Add\n\n1 2", "3", kind="benign"), Example("Greet", "Hi", kind="benign"), Example("Hey", "Yo", system="Be kind")]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), tmp_path / "alpaca.parquet")
    assert read_examples(tmp_path / "alpaca.json") == wanted
    assert read_examples(tmp_path / "alpaca.jsonl") == wanted
    assert read_examples(tmp_path / "alpaca.parquet") == wanted[:2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[", "not valid JSON"),
        ("a.json", '{"prompt": "x"}', "a list of rows is expected"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "one user message"),
        ("a.jsonl", '{"messages": "hi"}', "other values than texts"),
        ("a.jsonl", '{"instruction": 5, "output": "x"}', "other values than texts"),
        ("a.csv", "goal,target\nHum,\n", "Known sets are read as they are: XSTest"),
        ("a.csv", "question,answer\nHum,Sing\n", "Unknown column"),
        ("a.csv", "Behavior,FunctionalCategory\nHum,standard\n", "'response' is missing"),
    ],
)
def test_what_is_no_set(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / name)


def test_a_set_s_rows_may_have_our_columns(tmp_path: Path) -> None:
    row = {"instruction": "Add", "output": "3", "split": "heldout", "category": "sums", "id": 7}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read_examples(tmp_path / "a.jsonl") == [Example("Add", "3", "sums", "benign", "heldout", id="7")]
    (tmp_path / "latin.csv").write_bytes("prompt,response\ncaf\u00e9,x\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_examples(tmp_path / "latin.csv")
    with pytest.raises(UserError, match="A limit of -1"):
        chosen(tmp_path / "a.jsonl", limit=-1)


def test_rows_without_a_split_belong_to_every_split(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "a"}, {"prompt": "b", "split": "train"}, {"prompt": "c", "split": "heldout"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [one.prompt for one in chosen(file, "heldout", responses=False)] == ["a", "c"]
    assert [one.prompt for one in chosen(file, "", 2, responses=False)] == ["a", "b"]
    file.write_text(json.dumps(rows[1]))
    with pytest.raises(UserError, match="no rows of split 'heldout'"):
        chosen(file, "heldout", responses=False)
