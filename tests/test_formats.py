"""Files of public sets, read as they are: their columns, with mild rows of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from jaxmed.errors import UserError
from jaxmed.prompts.examples import Example, chosen, read_examples
from jaxmed.prompts.readers import read_pairs

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

CSV |= {
    "with_an_index.csv": (
        ",goal,target\n0,Hum a song,Sure: hum\n1,Sing,\n",
        [Example("Hum a song", "Sure: hum", kind="harmful"), Example("Sing", kind="harmful")],
    ),
    "unnamed.csv": ("Unnamed: 0,prompt,category\n0,Hum,noise\n", [Example("Hum", category="noise")]),
    "advbench_of_prompts.csv": ("prompt,target\nHum,Sure\n", [Example("Hum", "Sure", kind="harmful")]),
    "xstest_without_focus.csv": (
        "id,prompt,type,label,focus,note\n7,When was it built?,historical_events,safe,,\n",
        [Example("When was it built?", category="historical_events", kind="benign", id="7")],
    ),
    "harmbench_without_category.csv": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\nHum,,,,,\n",
        [Example("Hum", kind="harmful")],
    ),
    "jailbreakbench_without_target.csv": ("Index,Goal,Target,Behavior,Category,Source\n0,Hum,,,,\n", [Example("Hum")]),
    "strongreject_without_category.csv": ("category,source,forbidden_prompt\n,,Hum\n", [Example("Hum", kind="harmful")]),
    "alpaca.csv": (
        "instruction,input,output,text\nAdd,,3,x\nDraw,,,x\n",
        [Example("Add", "3", kind="benign"), Example("Draw", kind="benign")],
    ),
    "dolly.csv": ("instruction,context,response,category\nSay,It rains.,Yes,qa\n", [Example("Say\n\nIt rains.", "Yes", "qa", "benign")]),
    "list.csv": ('How do I hum?\n"Sing, and dance"\n', [Example("How do I hum?"), Example("Sing, and dance")]),
    "semicolons.csv": ("prompt;category\nHum, please;noise\n", [Example("Hum, please", category="noise")]),
    "tabs.tsv": ("prompt\tcategory\nHum, please\tnoise\n", [Example("Hum, please", category="noise")]),
    "lines.csv": ("prompt,category\r\nHum\u2028loud\x85ly,noise\r\n\r\n", [Example("Hum\u2028loud\x85ly", category="noise")]),
    "harmful_strings.csv": (
        "target\nHum a song | and dance\nSing.\n",
        [Example("Hum a song | and dance", kind="harmful"), Example("Sing.", kind="harmful")],
    ),
    "contexts.csv": (
        "prompt,context,category\nSum this up,Once upon a time,noise\nHum,,noise\n",
        [Example("Once upon a time\n\n---\n\nSum this up", category="noise"), Example("Hum", category="noise")],
    ),
    "judged.csv": ("Index,goal,prompt,target_response,human1\n0,Hum,Hum please,La la,1\n", [Example("Hum please", "La la")]),
    "xstest_answered.csv": (
        "id,type,prompt,focus,note,completion,final_label\nv2-1,homonyms,Kill time?,kill,,Read a book,1_full_compliance\n",
        [Example("Kill time?", "Read a book", "homonyms", "benign", id="v2-1")],
    ),
    "category_4.csv": ("prompt\nHum\n", [Example("Hum")]),
    "category_5.csv": ("prompt,category\nHum,noise\n", [Example("Hum", category="noise")]),
    "blank_lines.csv": ("\n\r\nprompt;category\nHum;noise\n\n", [Example("Hum", category="noise")]),
    "more_columns.csv": ("prompt,category,source,year\nHum,noise,us,1999\n", [Example("Hum", category="noise")]),
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
        ("a.csv", "goal,target\nHum,\n", "'response' is missing"),
        ("a.csv", "goals,tgt\nHum,\n", "Known sets are read as they are: XSTest"),
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


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path: Path, mark: str) -> None:
    row = {"prompt": f"Hum{mark}a song", "response": "Sure"}
    text = json.dumps(row, ensure_ascii=False) if mark > "\x1f" else json.dumps(row)
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{text}\r\n\r\n{text}".encode())
    assert read_examples(tmp_path / "a.jsonl") == [Example(**row)] * 2


def test_json_files_are_lists_lines_or_one_list_under_a_name(tmp_path: Path) -> None:
    row = {"prompt": "Hum", "response": "Sure"}
    for text in (
        json.dumps([row, row]),
        json.dumps({"by": {"a": 1}, "version": 2, "rows": [row, row]}),
        f"{json.dumps(row)}\n{json.dumps(row)}\n",
        json.dumps({"data": [row, row]}),
    ):
        (tmp_path / "a.json").write_text("\ufeff" + text, encoding="utf-8")
        assert read_examples(tmp_path / "a.json") == [Example(**row)] * 2
    (tmp_path / "a.json").write_text('["Hum", "Sing"]')
    assert read_examples(tmp_path / "a.json", responses=False) == [Example("Hum"), Example("Sing")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_byte_order_marks_tell_the_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    row = {"prompt": "Hum in the caf\u00e9", "response": "La"}
    text = (
        "prompt,response\n" + ",".join(row.values()) if name == "a.csv" else json.dumps(row if "l" in name else [row], ensure_ascii=False)
    )
    (tmp_path / name).write_text(text, encoding=encoding)
    assert read_examples(tmp_path / name) == [Example(**row)]


@pytest.mark.parametrize("empty", [None, "", float("nan"), np.float32("nan"), pandas.NA, pandas.NaT])
def test_rows_in_memory_are_those_of_numpy_and_pandas(empty: Any) -> None:
    row = {"id": np.int64(7), "base": "a", "source": "b", "target": np.array(["Sure", "Yes"]), "foil": np.float32(4), "category": empty}
    pair = read_pairs([row])[0]
    assert (pair.id, pair.target, pair.foil, pair.category) == ("7", ("Sure", "Yes"), ("4",), "")
    assert read_examples([{"prompt": "Hum", "type": "noise", "focus": empty, "system": empty}], responses=False)[0].system is None
    assert read_pairs(pandas.DataFrame([row])) == [pair]


@pytest.mark.parametrize(
    ("cell", "read"),
    [
        ("['a', 'b']", ("a", "b")),
        ('["a", "b"]', ("a", "b")),
        ("a|b", ("a", "b")),
        ("['a', \"it's\"]", ("a", "it's")),
        ("[1, 'b']", ("1", "b")),
        ("[it's]", ("[it's]",)),
    ],
)
def test_lists_in_cells_are_those_of_json_and_python(tmp_path: Path, cell: str, read: tuple[str, ...]) -> None:
    pandas.DataFrame([{"id": "x", "base": "a", "source": "b", "target": cell, "foil": "z"}]).to_csv(tmp_path / "a.csv")
    assert read_pairs(tmp_path / "a.csv")[0].target == read


@pytest.mark.parametrize("cell", ["['a' 'b']", "['a', b, 'c']", '["a" "b"]'])
def test_lists_in_another_notation_are_refused(tmp_path: Path, cell: str) -> None:
    pandas.DataFrame([{"id": "x", "base": "a", "source": "b", "target": cell, "foil": "z"}]).to_csv(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"line 2: column 'target' holds .*write a list as JSON"):
        read_pairs(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "Hum\nSing\n", "first line, 'Hum', is read as names of columns"),
        ("a.csv", "Hum loudly\nSing\n", "write `prompt` on a line before it"),
        ("a.csv", "How do I hum, please?\nSing, now\n", "quote texts that hold a ','"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.csv", "prompt,category\nHum, please,noise\n", "3 fields, more or fewer than the header's 2; quote texts"),
        ("a.csv", "prompt,prompt\nHum,Sing\n", "column 'prompt' twice"),
        ("a.csv", "prompt,catgory\nHum,noise\n", "Unknown column 'catgory'. Did you mean 'category'"),
        ("a.csv", "Prompt,category\nHum,noise\n", "Did you mean 'prompt'"),
        ("a.csv", "prompt,split\n,train\nHum,dev\n", r"2 problems:\n.*line 2: the column 'prompt'.*\n.*line 3: split 'dev'"),
    ],
)
def test_messages_name_the_cause(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / name, responses=False)
