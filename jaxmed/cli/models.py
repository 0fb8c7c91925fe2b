"""The command `models`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags, build
from jaxmed.errors import unknown
from jaxmed.models.catalog import CATALOG, HUB_EXAMPLES, VARIANTS, cache_folder, cached_file, hub_cached, is_built


@dataclass(frozen=True, kw_only=True)
class Models(ConfigFlags):
    """Lists known models, their sizes and licences, and what is on this machine."""

    build: str = ""
    """Variant to build now, such as smollm2-135m-aligned, instead of on its first use."""

    def run(self) -> None:
        """Builds what is asked for, and prints a table."""
        if self.build:
            if self.build not in VARIANTS:
                raise unknown("variant", self.build, VARIANTS)
            build(self.build)
        show.table("Models by name", ("name", "parameters", "licence", "here", "note"), rows(), 5)
        where = f"Cache: {cache_folder()}. A local folder (config.json and safetensors) or a .gguf file works as a name too."
        show.out.print(where, markup=False)


def rows() -> list[tuple[str, str, str, str, str]]:
    """A row per known model: name, parameters, licence, whether it is here, note."""
    found = []
    here = hub_cached()
    for name, known in CATALOG.items():
        size = f"{known.size / 1e6:.0f} MB"
        held = f"yes ({size})" if cached_file(name).is_file() else f"fetched on first use ({size})"
        found.append((name, f"{known.parameters / 1e6:.0f}M", known.licence, held, known.note))
    for name, variant in VARIANTS.items():
        base = CATALOG[variant.base]
        held = "yes" if is_built(name) else "built on first use"
        found.append((name, f"{base.parameters / 1e6:.0f}M", base.licence, held, variant.note))
    found += [(name, size, licence, "yes" if name in here else "on the hub", "") for name, (size, licence) in HUB_EXAMPLES.items()]
    return [*found, *((name, "", "", "yes", "in the Hugging Face cache") for name in sorted(set(here) - set(HUB_EXAMPLES)))]
