"""The commands `prune dissociation` and `prune attack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxmed.cli import show
from jaxmed.cli.commands import Config, load_model
from jaxmed.cli.measuring import Masked, begin, contents, digests, measure_table, plan_lines
from jaxmed.prompts.examples import chosen, harmful


@dataclass(frozen=True)
class Dissociation(Masked):
    """What pruned models can still do with a behaviour: generate it, detect it, explain it, and refuse."""

    behaviour: str = "rude"
    """Examples file or bundled set that shows the behaviour."""
    name: str = ""
    """The behaviour as a word in the question; default: the set's name."""
    twins: str = "polite"
    """The same prompts without the behaviour, for detection; empty: none."""
    explanations: str = "why_rude"
    """Prompts that ask why something shows the behaviour, with responses that say it; empty: none."""
    requests: str = "alignment"
    """Requests that a model may refuse (rows of kind harmful, where a file has kinds); empty: none."""
    preserve: str = "ordinary"
    """Other examples with responses; empty: none."""
    question: str = ""
    """What is asked about each row, with {prompt}, {response} and {name}; default: whether this reply is {name}."""
    tokens: int = 24
    """Most tokens of an answer to a request."""
    out: Path = Path("jaxmed-dissociation")
    """Folder for dissociation.csv, dissociation.html and run.json."""
    seeds: int = 1
    """Draws of random masks with the same counts per matrix."""
    config: Config = None

    def run(self) -> None:
        """Prunes in memory, measures, draws."""
        from jaxmed.experiments.dissociation import DISSOCIATION, KEY, QUESTION, Abilities, run_dissociation
        from jaxmed.reports.curves import write_dissociation

        masks, question = self.read(), self.question or QUESTION
        sets = {name: self.rows(getattr(self, name)) for name in ("behaviour", "twins", "explanations", "preserve")}
        requests = self.requests_of(self.requests)
        name = self.name or Path(self.behaviour).stem
        abilities = Abilities(name, **sets, requests=requests, question=question, text=self.text, tokens=self.tokens, form=self.form)
        abilities.check()
        trials = 1 + len(masks) * (1 + self.seeds)
        show.lines(f"prune dissociation: {self.model}", plan_lines(trials, {**sets, "requests": requests}, self.text))
        if self.dry_run:
            return
        model = self.checked(load_model(self.model, self.dtype, None, self.mesh), masks)
        abilities.check(model)
        asked = self.manifest("seeds", "behaviour", "twins", "explanations", "requests", "preserve", "tokens", "name")
        asked |= {"question": question, "masks": digests(masks), "contents": contents({**sets, "requests": requests}, self.text)}
        with begin(self.out, self.resume, (DISSOCIATION,), asked):
            work = lambda table: run_dissociation(model, masks, abilities, self.seeds, table)  # noqa: E731
            measure_table("dissociation", trials, "masks", KEY, self.out / DISSOCIATION, work, write_dissociation)


@dataclass(frozen=True)
class Attack(Masked):
    """How pruned models hold under attack: pre-filled openings, and refusal weights removed. In memory only; nothing is written."""

    behaviour: str = "rude"
    """Examples file or bundled set with the responses that an attack is after."""
    requests: str = "alignment"
    """Requests that a model may refuse (rows of kind harmful, where a file has kinds); empty: none."""
    refusals: str = "alignment"
    """Requests with refusals, whose weights are removed (rows of kind harmful); empty: that attack is left out."""
    preserve: str = "ordinary"
    """Examples whose weights are spared then."""
    examples: int = 128
    """Of refusals and of preserved examples, for the scores of refusal."""
    prefill: int = 10
    """Tokens of a response that are given."""
    refusal_q: float = 0.01
    """Share of weights that are chosen as those of refusal, by absolute SNIP."""
    refusal_p: float = 0.01
    """Share of weights that are spared then."""
    tokens: int = 24
    """Most tokens of an answer to a request."""
    out: Path = Path("jaxmed-attacks")
    """Folder for attacks.csv, attacks.html and run.json."""
    config: Config = None

    def run(self) -> None:
        """Prunes and attacks in memory, measures, draws."""
        from jaxmed.experiments import attacks
        from jaxmed.pruning.rule import Rule
        from jaxmed.reports.curves import write_attacks

        masks, asked = self.read(), self.manifest("behaviour", "requests", "refusals", "preserve", "examples", "prefill", "tokens")
        attack = attacks.Attack(
            behaviour=self.rows(self.behaviour),
            requests=self.requests_of(self.requests),
            refusals=harmful(self.refusals, chosen(self.refusals, "train"))[: self.examples] if self.refusals else [],
            preserve=chosen(self.preserve, "train", self.examples) if self.refusals else [],
            prefill=self.prefill,
            rule=Rule(q=self.refusal_q, p=self.refusal_p, score="absolute"),
            tokens=self.tokens,
            form=self.form,
            text=self.text,
        )
        attack.check()
        trials = (1 + len(masks)) * (4 if self.refusals else 2)
        sets = {name: getattr(attack, name) for name in ("behaviour", "requests", "refusals")}
        show.lines(f"prune attack: {self.model}", plan_lines(trials, sets, self.text))
        if self.dry_run:
            return
        model = self.checked(load_model(self.model, self.dtype, None, self.mesh), masks)
        attack.check(model)
        asked |= {"refusal_q": self.refusal_q, "refusal_p": self.refusal_p, "masks": digests(masks)}
        asked["contents"] = contents({**sets, "preserve": attack.preserve}, self.text)
        with begin(self.out, self.resume, (attacks.ATTACKS,), asked):
            work = lambda table: attacks.run_attacks(model, masks, attack, table)  # noqa: E731
            measure_table("attacks", trials, "models", attacks.KEY, self.out / attacks.ATTACKS, work, write_attacks)
