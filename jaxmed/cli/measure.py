"""What the commands that measure pruned models share: fields, the beginning of their folder, their table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmed.cli import show
from jaxmed.cli.flags import ModelFlags, RunFlags, SetFlags
from jaxmed.errors import UserError
from jaxmed.experiments.specs import TextSpec
from jaxmed.prompts.examples import chosen, harmful
from jaxmed.prompts.readers import read_text


@dataclass(frozen=True, kw_only=True)
class MeasureFlags(ModelFlags, SetFlags, TextSpec, RunFlags):
    """How pruned models are measured."""

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

    def manifest(self, model: Any, *more: str) -> dict[str, Any]:
        """What makes two runs the same run: the model's weights, and the values of these fields."""
        same = ("split", "limit", "text", "form", *more)
        return (
            self.asked()
            | {"weights": model.identity}
            | {name: str(value) if isinstance(value := getattr(self, name), Path) else value for name in same}
        )


@dataclass(frozen=True, kw_only=True)
class MaskFlags(MeasureFlags):
    """Several masks."""

    masks: tuple[Path, ...] = ()
    """Mask files of one model; their names name the rows of the table."""

    def read(self) -> dict[str, Any]:
        """The masks by name."""
        from jaxmed.pruning import read_mask

        if not self.masks:
            raise UserError("Give at least one mask file: --masks A.safetensors B.safetensors.")
        masks = {file.stem: read_mask(file) for file in self.masks}
        if len(masks) < len(self.masks) or "none" in masks:
            raise UserError("Rows are named after the mask files: no two may have the same name, and none may be called 'none'.")
        return masks

    def checked(self, masks: Mapping[str, Any]) -> Any:
        """The model without its weights, once every mask fits it."""
        from jaxmed.pruning.apply import check_mask

        model = self.describe()
        for mask in masks.values():
            check_mask(model, mask)
        return model


def plan_lines(masks: int, sets: Mapping[str, Sequence[Any]], text: str) -> list[str]:
    """What will be measured, in words; raises a UserError for a text that cannot be read."""
    if text:
        read_text(text)
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

    return digest([*(row for rows in sets.values() for row in rows)], read_text(text) if text else "")


def measure_table(title: str, count: int, unit: str, key: Sequence[str], file: Path, work: Callable[..., Any], draw: Any) -> None:
    """Fills the table in a file with progress, going on after its last row; prints it, and draws it beside the file.

    Args:
        count, unit: how many rows are to come, and what they are called.
        work: fills the table.
        draw: (file, html file) -> html file.
    """
    from jaxmed.experiments.table import continued

    with show.progress(title, count, unit) as report:
        table = continued(key, file, report)
        work(table=table)
    show_rows(table.rows, key, f"95 % intervals: {file}")
    show.out.print(f"{title}: {draw(file, file.with_suffix('.html'))}", markup=False)


def show_rows(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], note: str) -> None:
    """Prints a table of the rows: keys, weights, the rise of every loss, the perplexity's ratio, rates."""
    names = [column.removesuffix("_rise") for column in rows[0] if column.endswith("_rise")]
    others = {"first_order": "first order", "perplexity_ratio": "perplexity x", "detect_auc": "detect (AUC)", "refuse": "refuse"}
    others = {column: title for column, title in others.items() if column in rows[0]}
    columns, cells = (*keys, "weights", *names, *others.values()), []
    for row in rows:
        first = [f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        more = [f"{row[column]:+.3f}" if column == "first_order" else number(row[column]) for column in others]
        cells.append([*first, f"{int(row['weights']):,}", *(f"{row[f'{name}_rise']:+.3f}" for name in names), *more])
    show.table(f"rise of the loss, nats per response token ({note})", columns, cells, len(keys))


def number(value: Any) -> str:
    """Three decimals, or a dash where there is none."""
    return f"{value:.3f}" if isinstance(value, float) else "-"
