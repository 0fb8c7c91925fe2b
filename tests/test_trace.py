"""Traces: single tokens with their texts, and named spans of prompts of different lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.cli.main import main
from jaxmed.cli.trace import Trace
from jaxmed.errors import UserError
from jaxmed.models.model import Model
from jaxmed.prompts import read_pairs
from jaxmed.reports.maps import position_map
from jaxmed.reports.record import read
from jaxmed.tokens import align, render
from tests import naive, tiny, tolerances

SPANNED = (
    replace(tiny.PAIRS[0], extra={"span_verb": "how to|how to", "span_object": "harm|help"}),
    replace(
        tiny.PAIRS[1], base="how to spoil a cake", source="how to bake it", extra={"span_verb": "how to", "span_object": ["cake", "it"]}
    ),
)


def test_tokens_stand_beside_the_effects_of_each_position(plain_model: Model, tmp_path) -> None:
    table = jm.trace(plain_model, tiny.PAIRS[:1], unit=("mlp_out", "head_out"), out=tmp_path / "run")
    ids = render(plain_model.tokenizer, tiny.PAIRS[0], "base").ids
    assert "".join(table.token.values[0]) == plain_model.tokenizer.decode(ids)
    figure = position_map(read(tmp_path / "run"), "mlp_out", "log-odds")
    assert len(figure.plot.layout.xaxis.ticktext) == len(ids)
    assert "⏎" in figure.plot.layout.xaxis.ticktext


def test_an_opening_is_given_to_the_pairs_that_are_chosen() -> None:
    opened = Trace(pair=("violence-01",), prefill="Well").pairs_of("harm")
    assert [(pair.id, pair.base_prefill, pair.source_prefill) for pair in opened] == [("violence-01", "Well", "Well")]


@pytest.mark.parametrize("number", [0, 1])
def test_each_span_is_patched_as_a_whole(plain_model: Model, number: int) -> None:
    """Against full forwards in which the tokens of the span have their source values."""
    table = jm.trace(plain_model, SPANNED, unit=("mlp_out", "head_out"), position="spans")
    assert list(table.position.values) == ["verb", "object", "rest of the request", "header"]
    pair = SPANNED[number]
    base, source = (render(plain_model.tokenizer, pair, side) for side in ("base", "source"))
    patches = align(base, source, "spans", pair.spans)
    for patch in patches:
        for unit, layer, index in (("mlp_out", 0, 0), ("head_out", 1, 2)):
            edits = naive.swap(plain_model, pair, patch, unit, layer, index, 1)
            wanted = naive.outcome(plain_model, pair, "base", "log-odds", edits) - naive.outcome(plain_model, pair, "base", "log-odds")
            found = table[unit].sel(position=patch.label)[number, layer]
            assert float(found if unit == "mlp_out" else found[index]) == pytest.approx(wanted, abs=tolerances.EFFECTS)
    assert np.isfinite(table.mlp_out.values).all()


def test_spans_of_unequal_length_align_from_the_right(plain_model: Model) -> None:
    base, source = (render(plain_model.tokenizer, SPANNED[1], side) for side in ("base", "source"))
    verb, object_, rest, header = align(base, source, "spans", SPANNED[1].spans)
    texts = [
        [prompt.text[slice(prompt.offsets[i][0], prompt.offsets[i][1])] for i in at]
        for prompt, at in ((base, object_.base), (source, object_.source))
    ]
    assert ["".join(text) for text in texts] == ["ke", "it"]
    assert (verb.label, header.label, rest.label) == ("verb", "header", "rest of the request")
    assert header.base[-1] == len(base.ids) - 1
    assert not {*verb.base, *object_.base} & {*rest.base}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ([{"span_verb": "sing"}, {}], "'sing' does not occur"),
        ([{"span_verb": "how to"}, {}], "Give all pairs the same columns"),
        ([{"span_a": "how to", "span_b": "to"}, {}], "shares token"),
        ([{"span_a": ["a", "b", "c"]}, {}], "a text, or one of base and one of source"),
        ([{"span_a": 3}, {}], "a text, or one of base and one of source"),
    ],
)
def test_spans_that_cannot_be_used_are_named(plain_model: Model, columns: list[dict], told: str) -> None:
    pairs = [replace(pair, extra=extra) for pair, extra in zip(SPANNED, columns, strict=True)]
    with pytest.raises(UserError, match=told):
        jm.trace(plain_model, pairs, unit="mlp_out", position="spans")


def test_span_columns_of_a_csv_file(plain_model: Model, tmp_path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(
        "id,base,source,target,foil,span_object\n1,how to harm,how to help,S,N,harm|help\n2,why go there,why go home,S,N,there|home\n"
    )
    table = jm.trace(plain_model, read_pairs(file), unit="mlp_out", position="spans", out=tmp_path / "run")
    assert list(table.position.values) == ["object", "rest of the request", "header"]
    assert list(position_map(read(tmp_path / "run"), "mlp_out", "log-odds").plot.layout.xaxis.ticktext) == list(table.position.values)


def test_a_pair_that_is_not_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--pair", "violence-99", "--out", "never"]) == 2
    said = capsys.readouterr().err
    assert "Did you mean 'violence-09'" in said
    assert len(said) < 300
