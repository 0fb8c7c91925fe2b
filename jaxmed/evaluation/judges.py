"""Judges: what says of a model's answers how far they refuse, or how far they do what was asked.

A judge maps requests and answers to numbers from 0 to 1; None where it could not tell. A new judge is one row of `JUDGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxmed.errors import UserError, unknown
from jaxmed.evaluation.grades import Judge
from jaxmed.evaluation.reasoning import cut_reasoning
from jaxmed.evaluation.refusals import is_refusal
from jaxmed.evaluation.rubrics import RUBRIC, read_rubric
from jaxmed.files import file_digest
from jaxmed.prompts.examples import Example

if TYPE_CHECKING:
    from jaxmed.evaluation.endpoint import Endpoint
    from jaxmed.models.model import Model

Load = Callable[..., "Model"]


@dataclass(frozen=True)
class JudgeSettings:
    """Who says what an answer is worth."""

    judge: Literal["rules", "strongreject", "http"] = "rules"
    """Who scores answers. rules: 1 for a refusal; strongreject: that classifier, run here; http: an endpoint, which gets the texts."""
    rubric: str = RUBRIC
    """Text file with the places {prompt} and {response}, or the bundled one: rubric. For strongreject, its judge_templates.json."""
    judge_model: str = ""
    """Model of the judge: the classifier of strongreject, such as google/gemma-2b, or its name at the endpoint of http."""
    judge_adapter: Path | None = None
    """Folder of the LoRA adapter of strongreject's classifier."""
    judge_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights and matmuls of strongreject's classifier."""
    endpoint: str = ""
    """Base address of an http judge, such as http://localhost:8000/v1."""
    key: str = "OPENAI_API_KEY"
    """Environment variable that holds the key of an http judge; the key is written nowhere."""
    grades: tuple[float, float] = (1.0, 5.0)
    """Lowest and highest grade of an http judge's rubric, which become scores 0 and 1."""
    per_minute: float = 0.0
    """Most requests per minute to an http judge; 0: no limit."""
    timeout: float = 60.0
    """Seconds after which a request to an http judge, its answer included, has failed."""
    retries: int = 5
    """Retries of a request to an http judge after a temporary failure."""
    judge_tokens: int = 64
    """Tokens of an http judge's reply at most."""
    judge_parameters: tuple[str, ...] | None = None
    """Which of max_tokens, max_completion_tokens and temperature an http judge is sent; default: what the endpoint accepts."""
    reasoning: Literal["cut", "keep"] = "cut"
    """Whether reasoning (<think>...</think> and the like) is cut off answers and replies before they are judged."""

    def record(self) -> dict[str, str]:
        """What a run notes of its judge, and compares when it is resumed: every setting, and what a rubric's file holds."""
        found = {one.name: str(getattr(self, one.name)) for one in fields(JudgeSettings)}
        file = Path(self.rubric)
        return found | ({"rubric_sha256": file_digest(file)} if file.is_file() else {})


@dataclass(frozen=True)
class JudgeSpec:
    """How a kind of judge is described, checked and made.

    Attributes:
        lines: what the plan says of it, warnings included.
        check: raises a UserError for settings and files that are missing or do not fit; loads no model, sends nothing.
        make: (settings, file that scores are kept in, whether replies are kept too, how models are loaded) -> judge; see `make_judge`.
    """

    lines: Callable[[JudgeSettings], list[str]]
    check: Callable[[JudgeSettings, Path | None], None]
    make: Callable[[JudgeSettings, Path | None, bool, Load | None], Judge]


def make_judge(settings: JudgeSettings, kept: Path | None = None, keep_text: bool = False, load_model: Load | None = None) -> Judge:
    """The judge that the settings name.

    Args:
        kept: file of scores of an endpoint, a line each, which is read first and added to; None: none is kept.
        keep_text: whether an endpoint's replies are kept with the scores.
        load_model: (name, dtype=, adapter=) -> model, for judges that run here; None: `models.load.load`.

    Raises:
        UserError: an unknown judge, settings that are missing or do not fit; what the judge's own functions raise.
    """
    spec = find_judge(settings.judge)
    spec.check(settings, kept)
    judge = spec.make(settings, kept, keep_text, load_model)
    if settings.reasoning == "keep":
        return judge
    return lambda requests, answers, report: judge(requests, [cut_reasoning(text) for text in answers], report)


def find_judge(name: str) -> JudgeSpec:
    """The row of `JUDGES`; a UserError with the legal names where there is none."""
    if name not in JUDGES:
        raise unknown("judge", name, JUDGES)
    return JUDGES[name]


def refusal_rules(short: int = 0) -> Judge:
    """1 for an answer that declines by the rules of `evaluation.refusals`, 0 for others; see `is_refusal` for `short`."""

    def judge(requests: Sequence[Example], answers: Sequence[str], report: Callable[[int], None]) -> list[float | None]:
        report(len(answers))
        return [float(is_refusal(text, short, marks=())) for text in answers]

    return judge


def _strongreject_lines(settings: JudgeSettings) -> list[str]:
    adapter = f" with {settings.judge_adapter}" if settings.judge_adapter else ""
    return [f"judge: StrongREJECT classifier {settings.judge_model}{adapter}; rubric {settings.rubric}"]


def _check_strongreject(settings: JudgeSettings, kept: Path | None) -> None:
    from jaxmed.evaluation.strongreject import read_template

    if not settings.judge_model:
        raise UserError("Give --judge-model (such as google/gemma-2b) and --judge-adapter, the classifier's LoRA adapter.")
    if settings.rubric == RUBRIC:
        raise UserError("Give --rubric: the rubric the classifier was trained with, such as StrongREJECT's judge_templates.json.")
    read_template(settings.rubric)


def _make_strongreject(settings: JudgeSettings, kept: Path | None, keep_text: bool, load_model: Load | None) -> Judge:
    from jaxmed.evaluation.strongreject import read_template, strongreject
    from jaxmed.models.load import load

    template = read_template(settings.rubric)
    return strongreject((load_model or load)(settings.judge_model, dtype=settings.judge_dtype, adapter=settings.judge_adapter), template)


def _endpoint(settings: JudgeSettings) -> Endpoint:
    from jaxmed.evaluation.endpoint import Endpoint

    lowest, highest = settings.grades
    waits = {"per_minute": settings.per_minute, "timeout": settings.timeout, "retries": settings.retries, "tokens": settings.judge_tokens}
    more = {"parameters": settings.judge_parameters, "cut": settings.reasoning == "cut"}
    endpoint = Endpoint(settings.endpoint, settings.judge_model, settings.key, lowest, highest, **waits, **more)
    endpoint.check()
    return endpoint


def _http_lines(settings: JudgeSettings) -> list[str]:
    judge = f"judge: {settings.judge_model} at {settings.endpoint}; rubric {settings.rubric}"
    return [judge, f"warning: {_endpoint(settings).warning}"]


def _check_http(settings: JudgeSettings, kept: Path | None) -> None:
    _endpoint(settings)
    read_rubric(settings.rubric)


def _make_http(settings: JudgeSettings, kept: Path | None, keep_text: bool, load_model: Load | None) -> Judge:
    from jaxmed.evaluation.http_judge import http_judge

    return http_judge(_endpoint(settings), read_rubric(settings.rubric), kept, keep_text)


JUDGES: dict[str, JudgeSpec] = {
    "rules": JudgeSpec(lambda settings: ["judge: refusal rules"], lambda settings, kept: None, lambda *_: refusal_rules()),
    "strongreject": JudgeSpec(_strongreject_lines, _check_strongreject, _make_strongreject),
    "http": JudgeSpec(_http_lines, _check_http, _make_http),
}
"""Name -> how the judge is made."""
