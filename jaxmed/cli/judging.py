"""Flags that choose a judge, shared by the commands that judge answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli.commands import load_model
from jaxmed.errors import UserError


@dataclass(frozen=True)
class Judging:
    """Who says what an answer is worth."""

    judge: Literal["rules", "strongreject", "http"] = "rules"
    """rules: 1 where an answer refuses; strongreject: that classifier, run here; http: an OpenAI-like endpoint, which gets the texts."""
    rubric: str = "rubric"
    """Text file with the places {prompt} and {response}, or the bundled one: rubric. For strongreject, its judge_templates.json."""
    judge_model: str = ""
    """strongreject: the classifier's model, such as google/gemma-2b; http: the model's name at the endpoint."""
    judge_adapter: Path | None = None
    """strongreject: folder of its LoRA adapter."""
    judge_dtype: Literal["float32", "bfloat16"] = "float32"
    """strongreject: weights and matmuls."""
    endpoint: str = ""
    """http: base address, such as http://localhost:8000/v1."""
    key: str = "OPENAI_API_KEY"
    """http: environment variable that holds the key; it is written nowhere."""
    grades: tuple[float, float] = (1.0, 5.0)
    """http: the rubric's lowest and highest grade, which become 0 and 1."""
    per_minute: float = 0.0
    """http: requests a minute at most; 0: no limit."""
    timeout: float = 60.0
    """http: seconds without an answer after which a request has failed."""
    retries: int = 5
    """http: further tries of a request that failed in passing."""
    judge_tokens: int = 64
    """http: most tokens of a reply."""

    def judge_lines(self) -> list[str]:
        """The judge in the plan, and what the user is warned of."""
        if self.judge == "http":
            return [f"judge: {self.judge_model} at {self.endpoint}; rubric {self.rubric}", f"warning: {self._endpoint().warning}"]
        if self.judge == "strongreject":
            adapter = f" with {self.judge_adapter}" if self.judge_adapter else ""
            return [f"judge: StrongREJECT classifier {self.judge_model}{adapter}; rubric {self.rubric}"]
        return ["judge: refusal rules"]

    def check_judge(self, out: Path | None) -> None:
        """Raises a UserError for flags and files of the judge that are missing or do not fit; loads no model."""
        if self.judge == "http":
            from jaxmed.evaluation.judges import read_rubric

            if out is None:
                raise UserError("Give --out with an endpoint: its scores are kept beside it, so that nothing is asked twice.")
            self._endpoint()
            read_rubric(self.rubric)
        if self.judge == "strongreject":
            from jaxmed.evaluation.strongreject import read_template

            if not self.judge_model:
                raise UserError("Give --judge-model (such as google/gemma-2b) and --judge-adapter, the classifier's LoRA adapter.")
            if self.rubric == "rubric":
                raise UserError("Give --rubric: the rubric the classifier was trained with, such as StrongREJECT's judge_templates.json.")
            read_template(self.rubric)

    def make_judge(self, out: Path | None, keep_text: bool, mesh: str | None) -> Any:
        """The judge.

        Args:
            out: the command's result; scores of an endpoint are kept in a file beside it.

        Raises:
            UserError: flags that are missing or do not fit; what the judges raise.
        """
        if self.judge == "rules":
            from jaxmed.evaluation.judges import refusal_rules

            return refusal_rules()
        if self.judge == "http":
            from jaxmed.evaluation.http_judge import http_judge
            from jaxmed.evaluation.judges import read_rubric

            kept = None if out is None else out.with_name(out.name + ".scores.jsonl")
            return http_judge(self._endpoint(), read_rubric(self.rubric), kept, keep_text)
        from jaxmed.evaluation.strongreject import read_template, strongreject

        template = read_template(self.rubric)
        return strongreject(load_model(self.judge_model, self.judge_dtype, None, mesh, adapter=self.judge_adapter), template)

    def _endpoint(self) -> Any:
        from jaxmed.evaluation.http_judge import Endpoint

        lowest, highest = self.grades
        waits = {"per_minute": self.per_minute, "timeout": self.timeout, "retries": self.retries, "tokens": self.judge_tokens}
        found = Endpoint(self.endpoint, self.judge_model, self.key, lowest, highest, **waits)
        found.check()
        return found
