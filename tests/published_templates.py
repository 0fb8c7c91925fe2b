"""Chat templates as their models' authors publish them: the llama.cpp project keeps copies, which come with a source package.

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


@cache
def published() -> dict[str, str]:
    """The templates of `BEHIND`, by name."""
    kept = cache_folder() / "templates"
    kept.mkdir(parents=True, exist_ok=True)
    with FileLock(kept / "lock"):
        if not all((kept / f"{name}.jinja").is_file() for name in BEHIND):
            _fetch(kept)
    return {name: (kept / f"{name}.jinja").read_text(encoding="utf-8") for name in BEHIND}


def _fetch(kept: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True, capture_output=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
        with tarfile.open(archive) as members:
            for member in members:
                if (name := Path(member.name)).suffix == ".jinja" and name.stem in BEHIND:
                    (kept / name.name).write_bytes(members.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]
