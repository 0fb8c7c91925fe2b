"""The command `prune attack`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from jaxmed.cli import show
from jaxmed.cli.measure import MaskFlags, begin, contents, digests, measure_table, plan_lines
from jaxmed.experiments.specs import AttackSpec


@dataclass(frozen=True, kw_only=True)
class Attack(MaskFlags, AttackSpec):
    """How pruned models hold under attack: pre-filled openings, refusal weights removed, harmful fine-tuning. In memory only; no attacked
    model is written."""

    behaviour: str = "rude"
    """Examples file or bundled set with the responses that an attack is after."""
    preserve: str = "ordinary"
    """Examples whose weights are spared when those of refusal are chosen, or a bundled set."""
    out: Path = Path("jaxmed-attacks")
    """Folder for attacks.csv, attacks.html and run.json."""

    def run(self) -> None:
        """Prunes and attacks in memory, measures, draws."""
        from jaxmed.experiments.attacks import ATTACKS, KEY, run_attacks
        from jaxmed.reports.curves import write_attacks

        masks = self.read()
        attack = self.make_attack(self.rows(self.behaviour), self.requests_of(self.requests), self.preserve, self.text, self.form)
        attack.check()
        model = self.checked(masks)
        attack.check(model)
        trials = (1 + len(masks)) * len(attack.names)
        sets = {name: getattr(attack, name) for name in ("behaviour", "requests", "refusals", "trained")}
        show.lines(f"prune attack: {self.model}", plan_lines(trials, sets, self.text))
        if self.dry_run:
            return
        asked = self.manifest(model, "behaviour", "requests", "refusals", "preserve", "refusal_examples", "prefill", "tokens")
        asked |= {"refusal_q": self.refusal_q, "refusal_p": self.refusal_p, "masks": digests(masks)}
        asked |= {"training": asdict(attack.training)} if attack.trained else {}
        asked["contents"] = contents({**sets, "preserve": attack.preserve}, self.text)
        with begin(self.out, self.resume, (ATTACKS,), asked):
            work = partial(run_attacks, self.load(), masks, attack)
            measure_table("attacks", trials, "models", KEY, self.out / ATTACKS, work, write_attacks)
