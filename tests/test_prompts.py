"""Pairs: bundled files, readers, and every malformed row said with its line."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxmed as jm
from jaxmed.effects.outcomes import encode_answers
from jaxmed.prompts.readers import BUNDLED
from jaxmed.tokens import render

ROW = {"id": "a", "category": "c", "base": "x", "source": "y", "target": ["S"], "foil": ["N", "I"]}


def test_bundled_sets_are_large_and_varied() -> None:
    harm, control, facts = (jm.read_pairs(name) for name in BUNDLED)
    assert len(harm) >= 80
    assert len(Counter(pair.category for pair in harm)) >= 8
    assert len(control) >= 40
    assert {pair.control for pair in control} == {"neutral", "paraphrase"}
    assert len(facts) >= 20
    assert not any(pair.response for pair in (*harm, *control))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_answers_are_single_tokens(smol, name: str) -> None:
    for pair in jm.read_pairs(name):
        answers = encode_answers(smol, pair, ("log-odds", "prefix-gap"))
        assert {len(ids) for ids in answers.ids} == {1}


@pytest.mark.parametrize("name", BUNDLED)
def test_groups_stay_on_one_side_of_the_split(name: str) -> None:
    sides: dict[str, set[str]] = {}
    for pair in jm.read_pairs(name):
        sides.setdefault(pair.group, set()).add(pair.split)
    assert all(len(side) == 1 for side in sides.values())


def test_half_of_the_harm_pairs_are_equally_long(smol) -> None:
    lengths = [[len(render(smol, pair, side).ids) for side in ("base", "source")] for pair in jm.read_pairs("harm")]
    assert sum(a == b for a, b in lengths) >= len(lengths) / 2


def test_csv_and_parquet_equal_jsonl(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "id": "b", "system": "be kind", "split": "heldout"}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    with (tmp_path / "p.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, [*ROW, "system", "split"], restval="")
        writer.writeheader()
        writer.writerows([{**row, "target": "S", "foil": json.dumps(row["foil"]) if row["id"] == "a" else "N|I"} for row in rows])
    pq.write_table(
        pa.Table.from_pylist([{**row, "system": row.get("system"), "split": row.get("split")} for row in rows]), tmp_path / "p.parquet"
    )
    wanted = jm.read_pairs(tmp_path / "p.jsonl")
    assert jm.read_pairs(tmp_path / "p.csv") == wanted == jm.read_pairs(tmp_path / "p.parquet") == jm.read_pairs(rows)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nonsense", "line 2: not valid JSON"),
        ("[1, 2]", "line 2: a row is an object"),
        (json.dumps({**ROW, "id": "b", "bse": "x"}), "Did you mean 'base'"),
        (json.dumps({**ROW, "id": ""}), "line 2: the column 'id'"),
        (json.dumps(ROW), "used before, at line 1"),
        (json.dumps({**ROW, "id": "b", "base": None}), "needs 'base' and 'source'"),
        (json.dumps({**ROW, "id": "b", "target": [""]}), "non-empty texts"),
        (json.dumps({**ROW, "id": "b", "target": True}), "column 'target' holds True"),
        (json.dumps({**ROW, "id": "b", "split": "train"}), "'train' is not one of"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(jm.UserError) as caught:
        jm.read_pairs(tmp_path / "p.jsonl")
    assert said in str(caught.value)


def test_an_empty_file_and_an_unknown_one(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(jm.UserError, match="holds no pairs"):
        jm.read_pairs(tmp_path / "p.jsonl")
    with pytest.raises(jm.UserError, match="Did you mean 'harm'"):
        jm.read_pairs("harms")
    (tmp_path / "p.txt").write_text("x")
    with pytest.raises(jm.UserError, match=r"\.parquet"):
        jm.read_pairs(tmp_path / "p.txt")


def test_all_problems_of_a_file_are_listed_together(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("{x\n" + json.dumps(ROW) + "\n[]\n")
    with pytest.raises(jm.UserError) as caught:
        jm.read_pairs(tmp_path / "p.jsonl")
    assert "2 problems" in str(caught.value)
    assert "line 1" in str(caught.value)
    assert "line 3" in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "target"),
    [
        ("33", ("33",)),
        (" 33", (" 33",)),
        ("007", ("007",)),
        ("True", ("True",)),
        ("null", ("null",)),
        ("1e5", ("1e5",)),
        ("-4|+4", ("-4", "+4")),
        ('["33", "34"]', ("33", "34")),
        ("[sic]", ("[sic]",)),
        ('"quoted"', ('"quoted"',)),
    ],
)
def test_cells_of_a_csv_file_are_texts(tmp_path: Path, cell: str, target: tuple[str, ...]) -> None:
    with (tmp_path / "p.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["id", "base", "source", "target", "foil"], ["7", "12 + 21 is", "12 + 22 is", cell, "zero"]])
    pair = jm.read_pairs(tmp_path / "p.csv")[0]
    assert (pair.id, pair.target, pair.foil) == ("7", target, ("zero",))


def test_columns_of_other_kinds_are_carried_along(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Unnamed: 0,id,base,source,target,foil,group,year,resource,group2\n0,a,x,y,S,N,g,1732,web,b\n")
    pair = jm.read_pairs(tmp_path / "p.csv")[0]
    assert pair.extra == {"year": "1732", "resource": "web", "group2": "b"}
    assert jm.read_pairs([{**ROW, "score": 0.5, "extra": {"note": "n"}}])[0].extra == {"note": "n", "score": 0.5}
    assert jm.read_pairs([ROW])[0].extra == {}


def test_optional_cells_may_be_empty(tmp_path: Path) -> None:
    header = "id,category,base,source,target,foil,system,group,split,control,messages,response"
    (tmp_path / "p.csv").write_text(f"{header}\na,,x,y,S,N,,,,,,\n", encoding="utf-8-sig")
    pair = jm.read_pairs(tmp_path / "p.csv")[0]
    assert (pair.system, pair.messages, pair.response, pair.group) == (None, None, None, "a")


@pytest.mark.parametrize(("given", "read"), [(4, "4"), (4.0, "4"), (-0.5, "-0.5"), ([4, "five"], "4"), ("4.0", "4.0")])
def test_numeric_answers_are_texts(given: Any, read: str, tmp_path: Path) -> None:
    rows = [{**ROW, "target": given}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert jm.read_pairs(tmp_path / "pairs.jsonl")[0].target[0] == jm.read_pairs(rows)[0].target[0] == read
    if not isinstance(given, list):
        assert jm.read_examples([{"prompt": "2 + 2", "response": given}])[0].response == read


@pytest.mark.parametrize("given", [True, {"a": 4}, [True], [float("nan")]])
def test_what_is_no_answer_is_refused(given: Any) -> None:
    with pytest.raises(jm.UserError, match="target"):
        jm.read_pairs([{**ROW, "target": given}])


def test_all_problems_of_a_file_are_told_at_once() -> None:
    rows = [{**ROW, "id": "", "targt": ["S"], "foil": {"no": 1}}, {**ROW, "id": 5, "split": "dev"}]
    with pytest.raises(jm.UserError) as caught:
        jm.read_pairs(rows)
    for said in ("'targt'", "'id' is missing", "'foil' holds", "'dev' is not one of"):
        assert said in str(caught.value)
