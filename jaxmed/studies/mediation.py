"""The study of mediation (after Ganguli and Moraffah 2026): where a request is read, where the answer is written, and by what.

Four parts, each a sweep or study of its own folder that resumes by itself: `reading` and `writing` patch modules layer by layer, and thirds
of the layers and all modules of a kind jointly, at two places; `control` does the same at the second place for pairs that do not differ in
the behaviour; `gate` is `jaxmed gate`. A fifth one, where a behaviour is named, is the `bridge` to pruning: whether the weights that carry
that behaviour sit at the units that mediate. Claims are answered from their tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.bridge.job import BridgeJob, make_bridge
from jaxmed.bridge.run import bridge_cost, check_bridge, run_bridge
from jaxmed.bridge.spec import BridgeSpec
from jaxmed.effects.cost import plan, progress_total
from jaxmed.effects.job import Job, make_job, manifest
from jaxmed.effects.outcomes import OutcomeName
from jaxmed.effects.sets import UnitSet
from jaxmed.effects.summary import summarise
from jaxmed.effects.sweep import run_sweep
from jaxmed.errors import UserError
from jaxmed.files import write_csv
from jaxmed.gating.clamp import Judging
from jaxmed.gating.job import GateJob, GateRequest, gate_manifest, make_gate
from jaxmed.gating.run import RULES, run_gate
from jaxmed.models.model import Model
from jaxmed.prompts.pair import PromptPair
from jaxmed.runs.cost import Cost
from jaxmed.runs.folder import RunFolder
from jaxmed.runs.legal import Legal
from jaxmed.runs.watch import Display, no_display
from jaxmed.studies.claims import make_claims
from jaxmed.studies.mediation_spec import MediationSpec
from jaxmed.studies.steps import Step, run_steps
from jaxmed.tokens import BY_POSITION

MODULES = ("attention_out", "mlp_out", "both_out")
THIRDS = ("early", "middle", "late")
VERDICTS = "verdicts.csv"
BRIDGE = "bridge"
LEGAL = Legal(("reading", "writing", "control", "gate", BRIDGE, VERDICTS, "report.html"), measured=(VERDICTS,))


def joint_sets(layers: int) -> tuple[UnitSet, ...]:
    """What is patched together: all that each third of the layers adds, and attention and MLP outputs of the late third and of all."""
    thirds = dict(zip(THIRDS, np.array_split(np.arange(layers), 3), strict=True))
    parts = {name: ("both_out", part) for name, part in thirds.items()}
    parts |= {
        f"{name} {kind}": (kind, part) for name, part in (("late", thirds["late"]), ("all", np.arange(layers))) for kind in MODULES[:2]
    }
    return tuple(UnitSet(name, tuple((kind, int(layer), 0) for layer in part)) for name, (kind, part) in parts.items())


@dataclass(frozen=True)
class MediationJob:
    """A checked study.

    Attributes:
        sweeps: "reading", "writing", and "control" where there are control pairs.
        gate: the study of the gate.
        bridge: to pruning, if any. It is no part of what makes two studies the same, so that a finished one may go on with it.
    """

    spec: MediationSpec
    sweeps: dict[str, Job]
    gate: GateJob
    bridge: BridgeJob | None = None

    @property
    def model(self) -> Model:
        return self.gate.model

    def with_weights(self, model: Model, source_model: Model | None = None) -> MediationJob:
        """The job on models that have weights."""
        sweeps = {name: job.with_weights(model, source_model) for name, job in self.sweeps.items()}
        gate = self.gate.with_weights(model, source_model)
        return replace(self, sweeps=sweeps, gate=gate, bridge=None if self.bridge is None else self.bridge.with_weights(gate))

    def with_bridge(self, spec: BridgeSpec, any_model: bool = False) -> MediationJob:
        """The job with a bridge to pruning; see `make_bridge`."""
        return replace(self, bridge=make_bridge(self.gate, spec, any_model))

    def manifest(self) -> dict[str, Any]:
        """What makes two studies the same study."""
        shared = {key: value for key, value in gate_manifest(self.gate).items() if key not in ("gate", "layout")}
        requests = {name: manifest(job)["request"] for name, job in self.sweeps.items()}
        controls = manifest(self.sweeps["control"])["tokens"] if "control" in self.sweeps else []
        return {"mediation": asdict(self.spec), "sweeps": requests, "controls": controls, **shared}


def make_mediation(
    model: Model,
    pairs: Sequence[PromptPair],
    controls: Sequence[PromptPair],
    spec: MediationSpec,
    outcome: OutcomeName = "log-odds",
    form: str = "chat",
    contrast: str = "pair",
    source_model: Model | None = None,
) -> MediationJob:
    """Everything that can be refused before a study runs; needs the tokenizer and the config, not the weights.

    Raises:
        UserError: what a sweep or the study of a gate refuses.
    """
    if spec.read_at in BY_POSITION:
        raise UserError(
            f"A study looks at one place where it is read; --read-at {spec.read_at} names one after another. Give user_last, ..."
        )
    gate = make_gate(model, pairs, GateRequest(spec, outcome, spec.write_at, form, contrast), source_model)
    request = gate.request.sweep(units=MODULES, sets=joint_sets(model.config.layers))
    places = {"reading": spec.read_at, "writing": spec.write_at}
    sweeps = {name: make_job(model, pairs, replace(request, position=place), source_model) for name, place in places.items()}
    if controls:
        sweeps["control"] = make_job(model, controls, replace(request, position=spec.write_at), source_model)
    return MediationJob(spec, sweeps, gate)


def mediation_steps(job: MediationJob, display: Display = no_display, judging: Judging = RULES, done: Path | None = None) -> list[Step]:
    """The parts of a study, with what they cost; sweeps that a run in `done` has finished are not counted again."""
    held = lambda name: None if done is None else done / name  # noqa: E731

    def sweep(name: str) -> Step:
        def run(out: Path) -> None:
            one = job.sweeps[name]
            with display(name, progress_total(one), "effects") as report:
                run_sweep(one, out / name, True, report)
            summarise(out / name, job.model, one.request.top, one.request.seed)

        return Step(name, (), replace(plan(job.sweeps[name], out=held(name)).cost, title=name), run)

    def gate(out: Path) -> None:
        run_gate(job.gate, out / "gate", True, display, judging)

    def bridge(out: Path) -> None:
        assert job.bridge is not None
        run_bridge(job.bridge, out / "gate" / "neurons", out / BRIDGE, display, judging)

    def answer(out: Path) -> None:
        write_csv(out / VERDICTS, [asdict(one) for one in make_claims(job.gate, out)])

    sweeps = [sweep(name) for name in job.sweeps]
    parts = {**job.gate.singles, "half1": job.gate.stand_in(0), "half2": job.gate.stand_in(1)}
    costs = sum((plan(one, out=held(f"gate/{name}")).cost for name, one in parts.items()), Cost("gate"))
    steps = [*sweeps, Step("gate", (), costs, gate)]
    steps += [Step(BRIDGE, ("gate",), bridge_cost(job.bridge), bridge)] if job.bridge is not None else []
    return [*steps, Step("claims", tuple(step.name for step in steps), Cost("claims"), answer)]


def run_mediation(job: MediationJob, out: Path, resume: bool = False, display: Display = no_display, judging: Judging = RULES) -> None:
    """Runs a study into `out`. What is finished is on disk at every moment.

    Raises:
        UserError: `out` holds something else, a study without `resume`, or another one; it is in use, or has no room.
    """
    steps = mediation_steps(job, display, judging)
    if job.bridge is not None:
        check_bridge(job.bridge, out / BRIDGE, judging)
    needed = sum(step.cost.written for step in steps)
    with RunFolder.open(out, job.manifest(), resume, LEGAL, needed) as folder, folder.session():
        run_steps(steps, out)
