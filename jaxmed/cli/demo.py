"""The command `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxmed.cli import show
from jaxmed.cli.flags import LogFlag, ModelFlags, PlanFlags
from jaxmed.cli.report import write_report
from jaxmed.cli.sweep import show_plan, sweep_job
from jaxmed.errors import UserError

PROFILE = ("attention_out", "mlp_out", "residual_out")


@dataclass(frozen=True, kw_only=True)
class Demo(ModelFlags, LogFlag, PlanFlags):
    """Sweeps a model: every neuron for two bundled pairs, and the layer, attention and MLP profile over more."""

    out: Path = Path("jaxmed-demo")
    """Folder for both tables and report.html; a second run continues what it holds."""
    pairs: int = 2
    """Pairs of the neuron sweep, 1 or more."""
    profile_pairs: int = 24
    """Pairs of the profile, 1 or more, spread over the harm categories."""

    def run(self) -> None:
        """Two sweeps and one page."""
        from jaxmed.effects.job import make_job
        from jaxmed.effects.request import Request
        from jaxmed.prompts import read_pairs
        from jaxmed.results import LEGAL
        from jaxmed.runs.legal import check_folder

        for flag, count in (("--pairs", self.pairs), ("--profile-pairs", self.profile_pairs)):
            if count < 1:
                raise UserError(f"{flag} {count} leaves no pairs. Give 1 or more.")
        pairs = read_pairs("harm")
        spread = pairs[:: max(1, len(pairs) // self.profile_pairs)][: self.profile_pairs]
        model = self.describe()
        jobs = {
            "profile": make_job(model, spread, Request(units=PROFILE)),
            "neurons": make_job(model, pairs[: self.pairs], Request()),
        }
        for name in jobs:
            check_folder(self.out / name, True, LEGAL)
        if self.dry_run:
            for name, job in jobs.items():
                show_plan(job, name, self.out / name)
            return
        model = self.load()
        ranked = {name: sweep_job(job.with_weights(model), self.out / name, True, name) for name, job in jobs.items()}
        write_report([self.out / name for name in jobs], self.out / "report.html")
        show.top_units(self.out / "neurons", ranked["neurons"])
