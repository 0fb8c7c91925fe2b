"""The commands `prune select`, `prune combine` and `prune compare`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags, ModelFlags, OneDeviceFlag, check_absent
from jaxmed.errors import UserError
from jaxmed.pruning.rule import Rule


def rule_of(command: Rule) -> Rule:
    """The rule among the flags of a command."""
    return Rule(**{field.name: getattr(command, field.name) for field in fields(Rule)})


@dataclass(frozen=True, kw_only=True)
class Select(OneDeviceFlag, ModelFlags, Rule, ConfigFlags):
    """Makes a mask from scores by a rule; by default the top q of -S (behaviour, signed) without the top p of A (preserve, absolute)."""

    scores: Path = Path("jaxmed-scores")
    """Folder of `prune score`."""
    preserve: Path | None = None
    """Folder whose preserve scores are taken, where the set was scored apart; default: those in --scores."""
    out: Path = Path("mask.safetensors")
    """The mask file; must not exist yet."""
    curve: Path | None = None
    """Folder of `prune curve` of these scores: where it shows that this q breaks the model, a warning says so."""
    tag: str = ""
    """What the mask is for: test, behaviour, defence or attack. One tagged 'attack' is applied in memory only."""
    model: str = ""
    """Model whose weights are read, for wanda and magnitude; empty: the scored one."""

    def run(self) -> None:
        """Selects and writes."""
        from jaxmed.models.checkpoints.edit_record import read_tag
        from jaxmed.pruning import read_scores, select, write_mask

        check_absent(self.out)
        read_tag(self.tag)
        rule = rule_of(self)
        rule.check()
        scores = read_scores(self.scores)
        preserve = None if self.preserve is None else read_scores(self.preserve)
        ratio = None if self.curve is None else curve_ratio(self.curve, scores, rule)
        mask = select(scores, rule, self._weights(scores, rule), self.tag, preserve)
        write_mask(mask, self.out)
        show.lines(f"mask: {self.out}", [*describe_mask(mask), *warnings_of(mask, rule, ratio)])

    def _weights(self, scores: Any, rule: Any) -> Any:
        from jaxmed.models.named_weights import weights_by_name
        from jaxmed.pruning.selection import needs_weights

        if not needs_weights(rule):
            return None
        model = replace(self, model=self.model or scores.model).load()
        if model.identity != scores.weights:
            raise UserError(
                f"The scores in {self.scores} are of other weights than {model.name!r} has. Give the scored model with --model."
            )
        return weights_by_name(model)


@dataclass(frozen=True, kw_only=True)
class Combine(ConfigFlags):
    """Intersects, unites or subtracts masks of one model, or inverts one."""

    masks: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Mask files, of one model."""
    how: Literal["intersect", "union", "subtract", "invert"] = "intersect"
    """Weights that are kept. intersect: in all masks; union: in any; subtract: in the first and no other; invert: not in the one given."""
    any_model: bool = False
    """Combine masks that were made of different weights; the result is of none of them, so applying it takes --any-model too."""
    out: Path = Path("combined.safetensors")
    """The mask file; must not exist yet."""

    def run(self) -> None:
        """Reads, combines, writes."""
        from jaxmed.pruning import combine, read_mask, write_mask

        check_absent(self.out)
        masks = [read_mask(file) for file in self.masks]
        if not self.masks:
            raise UserError("Give the masks to combine: `jaxmed prune combine A.safetensors B.safetensors`.")
        if self.how == "invert" and len(masks) != 1:
            raise UserError(f"To invert, give one mask, not {len(masks)}.")
        mask = masks[0].inverted() if self.how == "invert" else combine(masks, self.how, self.any_model)
        write_mask(mask, self.out)
        show.lines(f"mask: {self.out}", describe_mask(mask))


@dataclass(frozen=True, kw_only=True)
class Compare(OneDeviceFlag, ModelFlags, ConfigFlags):
    """Counts what masks share, pair by pair, against chance."""

    masks: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Mask files, at least two."""
    model: str = ""
    """Model whose weights the stratified chance is taken over; empty: plain chance alone."""

    def run(self) -> None:
        """Prints a table."""
        from jaxmed.models.named_weights import named_weights
        from jaxmed.pruning import overlap, read_mask

        if len(self.masks) < 2:
            raise UserError("Give at least two masks to compare.")
        short = len({file.stem for file in self.masks}) == len(self.masks)
        masks = {file.stem if short else str(file): read_mask(file) for file in self.masks}
        model = self.load() if self.model else None
        rows = []
        for one, other in combinations(masks, 2):
            found = overlap(masks[one], masks[other], None if model is None else named_weights(model))
            stratified = "" if found.stratified is None else f"{found.stratified:,.1f}"
            rows.append((one, other, f"{found.both:,}", f"{found.jaccard:.4f}", f"{found.by_chance:,.1f}", stratified))
        show.table("weights that two masks share", ("one", "other", "both", "Jaccard", "by chance", "by chance given |W|"), rows, 2)


def describe_mask(mask: Any) -> list[str]:
    """A mask in words: how many weights, and of which kinds of matrices."""
    from jaxmed.models.named_weights import kind_of

    kinds: dict[str, list[int]] = {}
    for name, count in mask.counts().items():
        kinds.setdefault(kind_of(name), []).append(count)
    each = ", ".join(f"{kind} {sum(found):,} (at most {max(found):,} in a matrix)" for kind, found in kinds.items())
    return [f"{mask.count:,} of {mask.size:,} weights ({mask.count / max(1, mask.size):.2e}), of {mask.model}", each]


BROKEN = 1.1
"""Perplexity over that of the unpruned model above which a model counts as broken."""
MANY = 1e-4
"""Fraction of all weights above which masks of targeted scores broke the models that were tried (the default one: x 9.5 at 3.6e-4)."""


def curve_ratio(folder: Path, scores: Any, rule: Rule) -> float:
    """Perplexity at the rule's q over that of the unpruned model, by a curve of the same scores; NaN where the curve has none.

    Raises:
        UserError: no curve there, or one of other scores or another rule.
    """
    import numpy as np

    from jaxmed.experiments.curve import CURVE
    from jaxmed.experiments.table import read_rows
    from jaxmed.runs.folder import read_run
    from jaxmed.runs.legal import check_tables

    if not (folder / CURVE).is_file():
        raise UserError(f"{folder} holds no curve. Give the --out folder of `jaxmed prune curve`.")
    if read_run(folder)["manifest"].get("scored_by") != scores.digest:
        raise UserError(f"The curve in {folder} is of other scores. Give one that was drawn with --scores of the same folder.")
    check_tables(folder, read_run(folder))
    rows = sorted(
        (row["q"], row["perplexity_ratio"]) for row in read_rows(folder / CURVE) if row["rule"] == rule.score and "perplexity_ratio" in row
    )
    if not rows:
        return float("nan")
    qs, ratios = np.log(np.array(rows, float)).T
    return float(np.exp(np.interp(np.log(rule.q), qs, ratios)))


def warnings_of(mask: Any, rule: Rule, ratio: float | None) -> list[str]:
    """What the user is warned of: a mask that breaks the model by its curve, or without a curve by its count."""
    if ratio is not None and ratio > BROKEN:
        return [
            f"warning: at this q the curve's perplexity is {ratio:.2f}x that of the unpruned model, which breaks it. Take a smaller --q."
        ]
    fraction = mask.count / max(1, mask.size)
    if (ratio is None or ratio != ratio) and fraction > MANY and rule.score in ("signed", "positive", "absolute", "wanda"):
        return [
            f"warning: {fraction:.1e} of all weights are many: such masks break a model ({MANY:g} is a lot). Look at `jaxmed prune curve`, "
            "and take a smaller --q where the perplexity rises."
        ]
    return []
