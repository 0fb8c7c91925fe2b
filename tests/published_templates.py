"""Chat templates and vocabularies as their models' authors publish them: the llama.cpp project keeps copies, in a source package.

They are fetched once, checked by digest, and not part of this repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

from jaxmed.models.folders import cache_folder

PACKAGE, SHA256 = "llama-cpp-python==0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

THINK = "<think>\n\n</think>\n\n"
BEHIND: dict[str, str | None] = {
    "Apertus-8B-Instruct": "",
    "ByteDance-Seed-OSS": "",
    "GLM-4.6": "\n<think></think>\n",
    "GLM-4.7-Flash": None,
    "HuggingFaceTB-SmolLM3-3B": "",
    "Kimi-K2-Instruct": "",
    "Kimi-K2-Thinking": "<think></think>",
    "LFM2-8B-A1B": "",
    "MiniMax-M1": "",
    "MiniMax-M2": None,
    "Mistral-Small-3.2-24B-Instruct-2506": "",
    "NVIDIA-Nemotron-Nano-v2": "",
    "Qwen-QwQ-32B": None,
    "Qwen-Qwen2.5-7B-Instruct": "",
    "Qwen-Qwen3-0.6B": THINK,
    "Qwen3-Coder": "",
    "Qwen3.5-4B": THINK.removeprefix("<think>\n"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": None,
    "deepseek-ai-DeepSeek-V3.1": "",
    "google-gemma-2-2b-it": "",
    "google-gemma-4-31B-it": None,
    "ibm-granite-granite-3.3-2B-Instruct": "",
    "ibm-granite-granite-4.0": "",
    "meetkai-functionary-medium-v3.2": "all\n",
    "meta-llama-Llama-3.1-8B-Instruct": "",
    "meta-llama-Llama-3.2-3B-Instruct": "",
    "meta-llama-Llama-3.3-70B-Instruct": "",
    "microsoft-Phi-3.5-mini-instruct": "",
    "mistralai-Mistral-Nemo-Instruct-2407": "",
    "openai-gpt-oss-120b": "<|channel|>final<|message|>",
    "unsloth-mistral-Devstral-Small-2507": "",
    "upstage-Solar-Open-100B": "<|content|>",
}
"""What whole conversations have between a prompt and an answer; None where they do not begin as the prompt does (past thoughts are cut)."""


VOCABULARIES = (
    "llama-spm phi-3 gpt-2 qwen2 llama-bpe deepseek-llm deepseek-coder falcon mpt refact".split()  # files without weights
)
FILES = (*(f"{name}.jinja" for name in BEHIND), *(f"ggml-vocab-{name}.gguf{end}" for name in VOCABULARIES for end in ("", ".inp", ".out")))


@cache
def published() -> dict[str, str]:
    """The templates of `BEHIND`, by name."""
    kept = published_folder()
    return {name: (kept / f"{name}.jinja").read_text(encoding="utf-8") for name in BEHIND}


@cache
def published_folder() -> Path:
    """A folder with `FILES`."""
    kept = cache_folder() / "templates"
    kept.mkdir(parents=True, exist_ok=True)
    with FileLock(kept / "lock"):
        if not all((kept / name).is_file() for name in FILES):
            _fetch(kept)
    return kept


def published_ids(vocabulary: str) -> tuple[Path, list[tuple[str, list[int]]]]:
    """A GGUF file of `VOCABULARIES`, and texts with the token ids that llama.cpp's own tests expect of it."""
    file = published_folder() / f"ggml-vocab-{vocabulary}.gguf"
    texts = file.with_name(file.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = file.with_name(file.name + ".out").read_text(encoding="utf-8").split("\n")
    return file, [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=False)]


def _fetch(kept: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True, capture_output=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
        with tarfile.open(archive) as members:
            for member in members:
                if (name := Path(member.name)).name in FILES:
                    (kept / name.name).write_bytes(members.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]
