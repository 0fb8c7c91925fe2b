"""What the commands that measure pruned models share: fields, the beginning of their folder, their table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.commands import Dtype
from jaxmed.errors import UserError
from jaxmed.models.catalog import DEFAULT
from jaxmed.prompts.examples import chosen, harmful


@dataclass(frozen=True)
class Measuring:
    """How pruned models are measured."""

    split: str = "heldout"
    """Rows of this split, where a file has splits; empty: all."""
    limit: int | None = None
    """The first so many examples of each set only."""
    text: str = "neutral"
    """Plain text file for the perplexity, or a bundled one: neutral, neutral-short. Empty: none."""
    form: Literal["plain", "space", "qa", "chat"] = "plain"
    """How prompt and response are joined, as in `prune score`."""
    model: str = DEFAULT
    """The scored model: known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    dtype: Dtype = "float32"
    """Weights and matmuls."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    resume: bool = False
    """Go on with what --out holds."""
    dry_run: bool = False
    """Print the plan and stop."""

    def sets(self, sources: Sequence[str]) -> dict[str, list[Any]]:
        """The test sets by name."""
        found = {Path(source).stem: self.rows(source) for source in sources}
        if len(found) < len(sources) or "scored" in found:
            raise UserError(f"Test sets are named after their files; {', '.join(sources)} has a name twice, or the reserved name 'scored'.")
        return found

    def rows(self, source: str) -> list[Any]:
        """Rows of a file or bundled set, with responses; none for an empty name."""
        return chosen(source, self.split, self.limit) if source else []

    def requests_of(self, source: str) -> list[Any]:
        """The harmful requests among the rows of a file or bundled set; none for an empty name."""
        return harmful(source, chosen(source, self.split, None, False))[: self.limit] if source else []

    def manifest(self, *more: str) -> dict[str, Any]:
        """What makes two runs the same run: the values of these fields."""
        same = ("model", "dtype", "split", "limit", "text", "form", *more)
        return {name: str(value) if isinstance(value := getattr(self, name), Path) else value for name in same}


@dataclass(frozen=True)
class Masked(Measuring):
    """Several masks."""

    masks: tuple[Path, ...] = ()
    """Mask files; their names name the rows."""

    def read(self) -> dict[str, Any]:
        """The masks by name."""
        from jaxmed.pruning import read_mask

        if not self.masks:
            raise UserError("Give at least one mask file: --masks A.safetensors B.safetensors.")
        masks = {file.stem: read_mask(file) for file in self.masks}
        if len(masks) < len(self.masks) or "none" in masks:
            raise UserError("Rows are named after the mask files: no two may have the same name, and none may be called 'none'.")
        return masks

    def checked(self, model: Any, masks: Mapping[str, Any]) -> Any:
        """The model, once every mask fits it."""
        from jaxmed.pruning.apply import check_mask

        for mask in masks.values():
            check_mask(model, mask)
        return model


def plan_lines(masks: int, sets: Mapping[str, Sequence[Any]], text: str) -> list[str]:
    """What will be measured, in words."""
    each = ", ".join(f"{len(found)} of {name}" for name, found in sets.items() if found)
    return [f"{masks} masks, each applied in memory; examples: {each}" + (f"; perplexity on {text}" if text else "")]


def begin(out: Path, resume: bool, tables: Sequence[str], manifest: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Begins or continues a folder of tables and their figure, and holds it inside the block; raises what `table.begin` does."""
    from jaxmed.experiments.table import begin

    return begin(out, resume, (tables[0].replace(".csv", ".html"), *tables), tables, manifest)


def digests(masks: Mapping[str, Any]) -> dict[str, Any]:
    """What tells masks apart, for the record."""
    return {
        name: {"weights": mask.count, "rule": dict(mask.rule), "of": mask.weights, "sha256": mask.digest} for name, mask in masks.items()
    }


def contents(sets: Mapping[str, Sequence[Any]], text: str) -> str:
    """SHA-256 of the examples and the plain text that models are tested on."""
    from jaxmed.prompts.examples import digest
    from jaxmed.prompts.readers import read_text

    return digest([*(row for rows in sets.values() for row in rows)], read_text(text) if text else "")


def measure_table(title: str, count: int, unit: str, key: Sequence[str], file: Path, work: Callable[[Any], Any], draw: Any) -> None:
    """Fills the table in a file with progress, going on after its last row; prints it, and draws it beside the file.

    Args:
        count, unit: how many rows are to come, and what they are called.
        work: fills the table.
        draw: (file, html file) -> html file.
    """
    from jaxmed.experiments.table import continued

    with show.progress(title, count, unit) as report:
        table = continued(key, file, report)
        work(table)
    show_rows(table.rows, key, f"95 % intervals: {file}")
    show.out.print(f"{title}: {draw(file, file.with_suffix('.html'))}", markup=False)


def show_rows(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], note: str) -> None:
    """Prints a table of the rows: keys, weights, the rise of every loss, the perplexity's ratio, rates."""
    from rich.table import Table

    names = [column.removesuffix("_rise") for column in rows[0] if column.endswith("_rise")]
    others = {"first_order": "first order", "perplexity_ratio": "perplexity x", "detect_auc": "detect (AUC)", "refuse": "refuse"}
    others = {column: title for column, title in others.items() if column in rows[0]}
    table = Table(title=f"rise of the loss, nats per response token ({note})", title_justify="left")
    for column in (*keys, "weights", *names, *others.values()):
        table.add_column(column, justify="left" if column in keys else "right")
    for row in rows:
        cells = [f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        more = [f"{row[column]:+.3f}" if column == "first_order" else number(row[column]) for column in others]
        table.add_row(*cells, f"{int(row['weights']):,}", *(f"{row[f'{name}_rise']:+.3f}" for name in names), *more)
    show.out.print(table)


def number(value: Any) -> str:
    """Three decimals, or a dash where there is none."""
    return f"{value:.3f}" if isinstance(value, float) else "-"
