"""Decoded weights in the cache folder: the same bits, nothing decoded twice, damage noticed, and never in the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import jaxmed as jm
from jaxmed.models.checkpoints import decoded
from tests import gguf_export, tiny

ROPE = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, **ROPE}
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*sorted(pre_tokenizers.ByteLevel.alphabet()), "hi", *(f"<{number}>" for number in range(7))],
    "tokenizer.ggml.token_type": [1] * 257 + [3] * 7,
    "tokenizer.ggml.merges": ["h i"],
    "tokenizer.ggml.bos_token_id": 257,
    "tokenizer.ggml.eos_token_id": 258,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": tiny.TEMPLATE,
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny quantised Llama with a tokenizer, and a cache of its own that keeps small files too."""
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "LEAST", 0)
    folder = tiny.write_checkpoint(tmp_path / "folder", **SHAPE)
    return gguf_export.export(folder, tmp_path / "tiny.gguf", "llama", "Q8_0", more=TOKENIZER)


@pytest.fixture
def nothing_decodes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes decoding fail from the call on."""

    def fail(*_: Any) -> None:
        raise AssertionError("a block was decoded")

    return lambda: monkeypatch.setattr(gguf, "dequantize", fail)


def same(one: jm.Model, other: jm.Model) -> bool:
    """Whether two models have the same bits."""
    leaves = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in leaves)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_load_decodes_nothing_and_is_the_same(file: Path, nothing_decodes: Callable, dtype: str, capsys: Any) -> None:
    first = jm.load(str(file), dtype=dtype)
    assert "are kept in" in capsys.readouterr().err
    nothing_decodes()
    second = jm.load(str(file), dtype=dtype)
    assert capsys.readouterr().err == ""
    assert same(first, second)
    assert first.config == second.config
    assert first.identity == second.identity
    for text in ("hi there", "<1>hi \n", ""):
        assert first.tokenizer(text)["input_ids"] == second.tokenizer(text)["input_ids"]
    assert first.tokenizer.all_special_ids == second.tokenizer.all_special_ids
    assert first.tokenizer.chat_template == second.tokenizer.chat_template == tiny.TEMPLATE


def test_any_mesh_maps_the_same_weights(file: Path, nothing_decodes: Callable) -> None:
    first = jm.load(str(file))
    nothing_decodes()
    assert all(same(first, jm.load(str(file), mesh=jm.make_mesh(f"{axis}=2"))) for axis in ("fsdp", "tensor"))


def _flip(held: Path) -> None:
    content = bytearray((held / "embedding").read_bytes())
    content[len(content) // 2] ^= 1
    (held / "embedding").write_bytes(content)


def _replace(file: Path, one: str, other: str) -> None:
    text = file.read_text()
    assert one in text
    file.write_text(text.replace(one, other, 1))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": _flip,
    "a cut file": lambda held: (held / "final_norm").write_bytes(b""),
    "a missing file": lambda held: (held / "blocks.down").unlink(),
    "a card that is no object": lambda held: (held / decoded.CARD).write_text("[]"),
    "another number in the card": lambda held: _replace(held / decoded.CARD, '"rope_theta": 1', '"rope_theta": 9'),
    "no card": lambda held: (held / decoded.CARD).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_mended(file: Path, tmp_path: Path, nothing_decodes: Callable, damage: str) -> None:
    first = jm.load(str(file))
    (held,) = (tmp_path / "cache" / "decoded").iterdir()
    DAMAGE[damage](held)
    assert same(first, jm.load(str(file)))
    nothing_decodes()
    assert same(first, jm.load(str(file)))


def test_a_damaged_tokenizer_is_built_again(file: Path, tmp_path: Path) -> None:
    ids = jm.load(str(file)).tokenizer("hi a")["input_ids"]
    (held,) = (tmp_path / "cache" / "decoded").iterdir()
    assert jm.load(str(file)).tokenizer("hi a")["input_ids"] == ids  # kept by now
    _replace(held / decoded.TOKENIZER, '\\"hi\\":', '\\"hj\\":')
    assert jm.load(str(file)).tokenizer("hi a")["input_ids"] == ids


def test_what_other_code_made_of_the_same_file_goes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = jm.load(str(file))
    jm.load(str(file), dtype="bfloat16")
    old = {folder.name for folder in (tmp_path / "cache" / "decoded").iterdir()}
    monkeypatch.setattr(decoded, "code_digest", lambda folder: "other code")
    assert same(first, jm.load(str(file)))
    now = {folder.name for folder in (tmp_path / "cache" / "decoded").iterdir()}
    assert (len(old), len(now), len(old & now)) == (2, 2, 1)  # that of bfloat16 stays until it is made anew


def test_a_change_of_the_file_is_noticed(file: Path, tmp_path: Path) -> None:
    first = jm.load(str(file))
    folder = tiny.write_checkpoint(tmp_path / "other", dtype=np.float16, **SHAPE)
    gguf_export.export(folder, file, "llama", "Q8_0")
    assert not same(first, jm.load(str(file)))


def test_int8_and_adapters_read_the_file_itself(file: Path) -> None:
    jm.load(str(file))
    assert jm.load(str(file), int8=True).params["blocks"]["down"].dtype == np.int8
    with pytest.raises(jm.UserError, match="An adapter is a folder"):
        jm.load(str(file), adapter=str(file.parent / "none"))


@pytest.mark.parametrize("gigabytes", ["0", "1e-9"])
def test_nothing_is_kept_beyond_the_limit(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: str) -> None:
    monkeypatch.setenv(decoded.LIMIT, gigabytes)
    jm.load(str(file))
    assert not (tmp_path / "cache" / "decoded").exists()


def test_a_limit_that_is_no_number_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(decoded.LIMIT, "much")
    with pytest.raises(jm.UserError, match="a number of gigabytes"):
        jm.load(str(file))


def test_the_oldest_gives_way(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(jm.load(str(file)).params))
    (old,) = (tmp_path / "cache" / "decoded").iterdir()
    monkeypatch.setenv(decoded.LIMIT, str(1.2 * size / 1e9))
    jm.load(str(file), dtype="bfloat16")
    (kept,) = (tmp_path / "cache" / "decoded").iterdir()
    assert kept != old


def test_a_cache_that_cannot_be_written_is_no_error(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_text("no folder")
    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "blocked"))
    assert jm.load(str(file)).config.layers == 3
