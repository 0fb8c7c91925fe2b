"""The command `prune dissociation`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxmed.cli import show
from jaxmed.cli.measure import MaskFlags, begin, contents, digests, measure_table, plan_lines
from jaxmed.experiments.specs import AbilitySpec


@dataclass(frozen=True, kw_only=True)
class Dissociation(MaskFlags, AbilitySpec):
    """What pruned models can still do with a behaviour: generate it, detect it, explain it, and refuse."""

    behaviour: str = "rude"
    """Examples file or bundled set with responses that show the behaviour."""
    preserve: str = "ordinary"
    """Other examples with responses, or a bundled set; empty: none."""
    out: Path = Path("jaxmed-dissociation")
    """Folder for dissociation.csv, dissociation.html and run.json."""

    def run(self) -> None:
        """Prunes in memory, measures, draws."""
        from jaxmed.experiments.dissociation import DISSOCIATION, KEY, run_dissociation
        from jaxmed.reports.curves import write_dissociation

        masks = self.read()
        sets = {name: self.rows(getattr(self, name)) for name in ("behaviour", "twins", "explanations", "preserve")}
        abilities = self.make_abilities(self.behaviour, sets, self.requests_of(self.requests), self.text, self.form)
        abilities.check()
        model = self.checked(masks)
        abilities.check(model)
        trials, tested = 1 + len(masks) * (1 + self.seeds), {**sets, "requests": abilities.requests}
        show.lines(f"prune dissociation: {self.model}", plan_lines(trials, tested, self.text))
        if self.dry_run:
            return
        asked = self.manifest(model, "seeds", "behaviour", "twins", "explanations", "requests", "preserve", "tokens", "name")
        asked |= {"question": abilities.question, "masks": digests(masks), "contents": contents(tested, self.text)}
        with begin(self.out, self.resume, (DISSOCIATION,), asked):
            work = partial(run_dissociation, self.load(), masks, abilities, self.seeds)
            measure_table("dissociation", trials, "masks", KEY, self.out / DISSOCIATION, work, write_dissociation)
