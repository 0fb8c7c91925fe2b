"""The command `study pruning`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype, load_model
from jaxmed.errors import UserError
from jaxmed.models.catalog import DEFAULT
from jaxmed.runs.folder import check_space


@dataclass(frozen=True)
class Pruning:
    """Targeted pruning end to end: curves, transfer, compression, dissociation and attacks, with figures and tables on one page."""

    models: tuple[str, ...] = (DEFAULT, "smollm2-135m-aligned")
    """Models in the order of their training, the base first; one is enough for all but compression."""
    behaviours: tuple[str, ...] = ("rude", "foolish", "sycophantic")
    """Bundled sets or your files with responses; dissociation and attacks are of the first."""
    controls: tuple[str, ...] = ("trivia", "pirate")
    """The same of control behaviours; compression is against the first."""
    preserve: str = "ordinary"
    """Set whose weights are spared."""
    q: float = 1e-4
    """Share of weights that are chosen per matrix, for transfer, dissociation and attacks."""
    p: float = 5e-3
    """Share that is spared."""
    qs: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    """Shares of the curves."""
    score_limit: int | None = None
    """First examples of each set that are scored."""
    test_limit: int | None = None
    """First held-out examples of each set that are tested."""
    text: str = "neutral"
    """Plain text file for the perplexity, or a bundled one: neutral, neutral-short."""
    form: Literal["plain", "space", "qa", "chat"] = "plain"
    """How prompt and response are joined."""
    against: tuple[Literal["positive", "absolute", "wanda", "magnitude", "random"], ...] = ("random",)
    """Baselines of the first behaviour's curve."""
    seeds: int = 1
    """Draws of random masks."""
    utility: float = 0.01
    """Rise of the perplexity, as a share, up to which a behaviour counts as halved without harm."""
    twins: str = "polite"
    """The first behaviour's prompts without the behaviour; empty: none."""
    explanations: str = "why_rude"
    """Prompts that ask why something shows the first behaviour; empty: none."""
    requests: str = "alignment"
    """Requests that a model may refuse (held-out rows of kind harmful); empty: none."""
    refusals: str = "alignment"
    """Requests with refusals, whose weights an attack removes in memory; empty: no such attack."""
    question: str = ""
    """What is asked about each row for detection, with {prompt}, {response} and {name}; default: whether this reply is {name}."""
    name: str = ""
    """The first behaviour as a word in the question; default: the set's name."""
    refusal_examples: int = 128
    """Refusals, and preserved examples, from which the weights of refusal are scored."""
    refusal_q: float = 0.01
    """Share of weights that are chosen as those of refusal."""
    refusal_p: float = 0.01
    """Share that is spared then."""
    prefill: int = 10
    """Tokens of a response that an attack gives."""
    tokens: int = 24
    """Most tokens of an answer to a request."""
    dtype: Dtype = "float32"
    """Weights and matmuls."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    out: Path = Path("jaxmed-pruning")
    """Folder for tables, masks, scores and report.html."""
    resume: bool = False
    """Go on with what --out holds."""
    dry_run: bool = False
    """Print the plan and stop."""
    config: Config = None

    def run(self) -> None:
        """Plans, runs, draws."""
        from jaxmed.experiments.dissociation import QUESTION
        from jaxmed.reports.study import write_study
        from jaxmed.studies.pruning import PruningStudy
        from jaxmed.studies.pruning_run import Run

        given: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(PruningStudy)}
        given["question"] = self.question or QUESTION
        study = PruningStudy(**given)
        study.check()
        study_run = Run(study, self.out, lambda name: load_model(name, self.dtype, None, self.mesh), show.progress)
        show.lines(f"study of targeted pruning: {', '.join(self.models)}", self._plan(study))
        if self.dry_run:
            return
        with study_run.begin(self.resume, self.dtype):
            study_run.everything()
        show.out.print(f"report: {write_study(self.out)}", markup=False)

    def _plan(self, study: Any) -> list[str]:
        from jaxmed.runs.cost import matmul_rate, show_time
        from jaxmed.studies.pruning import plan_steps

        base, *others = (load_model(name, self.dtype, None, self.mesh, weights=False) for name in self.models)
        for model in (base, *others):
            if model.tokenizer is None:
                raise UserError(f"{model.name!r} has no tokenizer.")
        for asked in (study.abilities, study.attack):
            asked.check((others or [base])[-1])
        config = base.config
        rate = matmul_rate(config, base.mesh, 1024)
        flops = 2 * (config.layers * config.layer_weights + config.vocabulary * config.width)
        lines, total = [], 0.0
        for step in plan_steps(study, base.tokenizer):
            seconds = step.passes * step.tokens * flops / rate
            lines.append(
                f"{step.title}: {step.passes:g} x {step.tokens:,} tokens, about {show_time(seconds)}" if step.tokens else step.title
            )
            total += seconds
        needed = study.disk_bytes(config)
        if not self.resume:
            check_space(self.out, needed)
        lines.append(f"scores on disk: {needed / 1e9:.1f} GB")
        return [*lines, f"about {show_time(total)} in all, besides loading and compiling"]
